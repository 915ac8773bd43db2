"""Milliseconds a training step: gumbo beside hand-written PyTorch, stock Pyro, and NumPyro.

    python benchmarks/step.py [--threads 2] [--rounds 12] [--batch 32 128 512] [--device cuda] [--quick] [--profile]

Three workloads on 28 × 28 binary images, the same batch at every step, Adam everywhere:

- gaussian: GaussianVAE 784–400–50–400–784, Bernoulli pixels, one reparameterized draw, log q − log p of the draw
- categorical: CategoricalVAE, 20 latents of 10 classes, leave-one-out gradients of K = 4 draws
- belief: SigmoidBeliefNetwork, one layer of 200 coins, DisARM

The hand-written version has the same networks and the same estimator and uses ``torch.optim.Adam(fused=True)``; with
the same noise its gradients are compared to gumbo's before anything is timed. Stock Pyro is ``SVI.step`` with
``pyro.optim.Adam`` and the ELBO that it has for such sites: Trace_ELBO; TraceGraph_ELBO with 4 particles in parallel;
TraceGraph_ELBO with one. JAX, where it is installed, runs NumPyro's own SVI (Trace_ELBO, TraceGraph_ELBO) and, for the
estimators that NumPyro lacks, a version written by hand, each step by step under ``jit`` and under ``lax.scan``.

All rivals live in one process and take turns of 20 steps in every round (100 on a GPU). ``--threads`` is the number of
cores: torch gets so many threads and the process, JAX with it, is bound to so many cores. Written: results/step.json
(on CUDA step-cuda.json), and with ``--profile`` also where the time goes, results/profile.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _by_hand
import numpy as np
import pyro
import torch
from _timing import RESULTS, Rival, interleaved_turns, median, remember, spread, surroundings, use_cores, write_json
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gumbo.guides import BernoulliGuide, CategoricalGuide, NormalGuide
from gumbo.inference import SiteELBO
from gumbo.inference.engine.rows import Rows
from gumbo.inference.engine.scopes import denormals_flushed
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import CategoricalVAE, GaussianVAE, SigmoidBeliefNetwork

SHAPE, LR, PARTICLES = (1, 28, 28), 1e-3, 4
TURN = 20  # steps; in fewer, what a call of lax.scan costs counts for more than over an epoch
HAND, HAND_COMPILED = "PyTorch by hand", "PyTorch by hand, torch.compile"
STOCK, STOCK_UNCHECKED = "Pyro SVI", "Pyro SVI, no validation"
EAGER, COMPILED = "gumbo", "gumbo, compiled"
NUMPYRO_JIT, NUMPYRO_SCAN = "NumPyro, jit", "NumPyro, lax.scan"
JAX_JIT, JAX_SCAN = "JAX by hand, jit", "JAX by hand, lax.scan"


@dataclass
class Workload:
    """A pair of programs, the loss of ours, the stock loss, and the version by hand (named alike for JAX)."""

    pair: Callable[[tuple[int, ...]], tuple[nn.Module, nn.Module]]
    ours: Callable[[], SiteELBO]
    stock: Callable[[], Any]
    by_hand: Callable[[nn.Module, nn.Module], nn.Module]
    said: str


def _gaussian(shape, latent_dim=50, hidden=(400,)):
    model = GaussianVAE(shape, latent_dim=latent_dim, hidden=hidden)
    return model, NormalGuide(model)


def _categorical(shape):
    model = CategoricalVAE(shape)
    return model, CategoricalGuide(model)


def _belief(shape, layers=(200,)):
    model = SigmoidBeliefNetwork(shape, layers=layers)
    return model, BernoulliGuide(model)


WORKLOADS = {
    "gaussian": Workload(
        _gaussian, lambda: SiteELBO("pathwise"), Trace_ELBO, _by_hand.Gaussian, "GaussianVAE 784–400–50, pathwise"
    ),
    "categorical": Workload(
        _categorical,
        lambda: SiteELBO("rloo", num_particles=PARTICLES),
        lambda: TraceGraph_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1),
        lambda model, guide: _by_hand.Categorical(model, guide, PARTICLES),
        f"CategoricalVAE 20 × 10, rloo, K = {PARTICLES}",
    ),
    "belief": Workload(
        _belief,
        lambda: SiteELBO("disarm"),
        TraceGraph_ELBO,
        _by_hand.Belief,
        "SigmoidBeliefNetwork of 200 coins, disarm",
    ),
}


def make_pair(workload: Workload, device: str = "cpu", shape: tuple[int, ...] = SHAPE) -> tuple[nn.Module, nn.Module]:
    """Model and guide with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, guide = workload.pair(shape)
    return model.to(device), guide.to(device)


def make_batch(batch_size: int, device: str = "cpu", shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(batch_size, *shape, generator=generator) < 0.3).float().to(device)


def check_same_gradients(workload: Workload, device: str = "cpu", shape: tuple[int, ...] = SHAPE) -> None:
    """Raise unless gumbo and the version by hand have equal losses and gradients for equal noise."""
    x = make_batch(32, device, shape)
    model, guide = make_pair(workload, device, shape)
    hand = workload.by_hand(model, guide)
    ours = workload.ours()(model, guide).initialize(x)
    torch.manual_seed(2)
    loss = ours(x)
    torch.manual_seed(2)
    value, objective = hand(x, hand.noise(x))
    loss.backward()
    objective.backward()
    torch.testing.assert_close(loss, value, rtol=1e-5, atol=0)
    programs, by_hand = (
        parameters(model.decoder, guide.encoder, guide.encoder_heads),
        parameters(hand.decoder, hand.encoder),
    )
    if hasattr(model, "decoder_prior_logits"):
        programs, by_hand = [*programs, model.decoder_prior_logits], [*by_hand, hand.prior]
    for number, (ours, theirs) in enumerate(zip(programs, by_hand, strict=True)):
        assert same(ours.grad, theirs.grad), f"parameter {number} has another gradient by hand"


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding, in units of the whole."""
    return bool((ours - theirs).norm() <= 1e-3 * ours.norm())


def check_same_gradients_in_jax(name: str, shape: tuple[int, ...] = SHAPE) -> None:
    """Raise unless JAX's version by hand has PyTorch's gradients for equal noise."""
    import jax
    import jax.numpy as jnp

    x, hand, twin, params = make_batch(32, shape=shape), *jax_twin(name, 32, shape)
    noise = hand.noise(x)
    hand(x, noise)[1].backward()
    found = jax.grad(twin.loss)(params, jnp.array(x.flatten(1).numpy()), jnp.array(noise.numpy()))
    layers = [leaf for network in (hand.encoder, hand.decoder) for leaf in network if hasattr(leaf, "weight")]
    pairs = [*zip(layers, [*found["encoder"], *found["decoder"]], strict=True)]
    for layer, (weight, bias) in pairs:
        for ours, theirs in ((layer.weight.grad, weight), (layer.bias.grad, bias)):
            assert same(ours, torch.from_numpy(np.array(theirs))), "JAX has another gradient"


def parameters(*networks: nn.Module) -> list[Tensor]:
    return [parameter for network in networks for parameter in network.parameters()]


# The rivals.


def waiting(step: Callable[[], object], device: str) -> Callable[[int], None]:
    def steps(n: int) -> None:
        for _ in range(n):
            step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return steps


def hand_step(hand: nn.Module, x: Tensor, compiled: bool) -> Callable[[], None]:
    optimizer = torch.optim.Adam(hand.parameters(), lr=LR, fused=True)
    loss = torch.compile(hand, dynamic=False) if compiled else hand

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(x, hand.noise(x))[1].backward()
        optimizer.step()

    return step


def stock_rival(workload: Workload, x: Tensor, device: str, validate: bool) -> Rival:
    svi = SVI(*make_pair(workload, device), pyro.optim.Adam({"lr": LR}), loss=workload.stock())
    store = {"params": {}, "constraints": {}}

    @contextlib.contextmanager
    def around():
        with pyro.get_param_store().scope(store), pyro.validation_enabled(validate):
            yield

    return Rival(waiting(lambda: svi.step(x), device), around)


def gumbo_rival(workload: Workload, x: Tensor, device: str) -> Rival:
    """The step that ``fit`` makes."""
    rows = Rows(x)
    step = TorchStep(*make_pair(workload, device), workload.ours(), make_optimizer("adam", LR)[0], rows)
    return Rival(waiting(lambda: step(rows), device), denormals_flushed)


def compiled_rival(workload: Workload, x: Tensor, device: str) -> Rival:
    """The stretches of steps that ``fit(compile=True)`` makes."""
    rows = Rows(x)
    step = CompiledStep(*make_pair(workload, device), workload.ours(), make_optimizer("adam", LR)[0], rows)
    step.code_between = False

    def stretches(n: int) -> None:
        made: list[tuple[Rows, float]] = []
        while len(made) < n:
            step.stretch(itertools.repeat(rows), made, n - len(made))

    return Rival(stretches, denormals_flushed, seconds=step.seconds)


def jax_twin(name: str, batch_size: int, shape: tuple[int, ...] = SHAPE) -> tuple[nn.Module, Any, Any]:
    """The version by hand, its twin in JAX, and the twin's parameters."""
    import _by_hand_jax

    hand = WORKLOADS[name].by_hand(*make_pair(WORKLOADS[name], shape=shape))
    return hand, getattr(_by_hand_jax, type(hand).__name__)(hand, batch_size), _by_hand_jax.parameters_of(hand)


def jax_rivals(name: str, x: Tensor) -> dict[str, Rival]:
    import _by_hand_jax
    import jax
    import jax.numpy as jnp

    _, twin, params = jax_twin(name, len(x))
    batch = jnp.array(x.flatten(1).numpy())
    makers = {(NUMPYRO_JIT, NUMPYRO_SCAN): _by_hand_jax.numpyro_update}
    if name != "gaussian":  # NumPyro has the estimator itself
        makers[JAX_JIT, JAX_SCAN] = _by_hand_jax.hand_update
    rivals = {}
    for names, make in makers.items():
        update, first = make(twin, params, LR)
        for said, scan in zip(names, (False, True), strict=True):
            state = jax.tree.map(jnp.copy, first(jax.random.PRNGKey(0), batch))
            rivals[said] = Rival(_by_hand_jax.stepper(update, state, batch, scan))
    return rivals


def rivals_of(name: str, batch_size: int, device: str, without: tuple[str, ...] = ()) -> dict[str, Rival]:
    workload, x = WORKLOADS[name], make_batch(batch_size, device)
    rivals = {}
    for said, compiled in ((HAND, False), (HAND_COMPILED, True)):
        if not (compiled and "compile" in without):
            hand = workload.by_hand(*make_pair(workload, device))
            rivals[said] = Rival(waiting(hand_step(hand, x, compiled), device))
    rivals[STOCK] = stock_rival(workload, x, device, validate=True)
    rivals[STOCK_UNCHECKED] = stock_rival(workload, x, device, validate=False)
    rivals[EAGER] = gumbo_rival(workload, x, device)
    if "compile" not in without:
        rivals[COMPILED] = compiled_rival(workload, x, device)
    if has_jax(device, without):
        rivals |= jax_rivals(name, x)
    return rivals


def has_jax(device: str, without: Sequence[str]) -> bool:
    return "jax" not in without and device == "cpu" and importlib.util.find_spec("numpyro") is not None


def first_turns(rivals: dict[str, Rival], turn: int) -> dict[str, float]:
    """Seconds to the end of the first turn of each: tracing and compiling, where there is any."""
    seconds = {}
    for name, rival in rivals.items():
        with rival.around():
            start = time.perf_counter()
            rival.steps(turn)
            seconds[name] = rival.seconds + time.perf_counter() - start
    return seconds


def measure(name: str, batch_size: int, device: str, rounds: int, without: tuple[str, ...] = ()) -> list[dict]:
    rivals = rivals_of(name, batch_size, device, without)
    turn = TURN * (1 if device == "cpu" else 5)
    first = first_turns(rivals, turn)
    times = interleaved_turns(rivals, rounds, turn)
    return [
        {"workload": name, "batch": batch_size, "rival": rival, "first_turn_s": first[rival], "turn": turn}
        | spread(values)
        for rival, values in times.items()
    ]


# What is shown.


def ratio(rows: list[dict], rival: str, other: str) -> float | None:
    found = {row["rival"]: row["median"] for row in rows}
    return found[rival] / found[other] if rival in found and other in found else None


RATIOS = ((EAGER, HAND), (EAGER, STOCK), (EAGER, STOCK_UNCHECKED), (COMPILED, HAND), (COMPILED, HAND_COMPILED)) + tuple(
    (ours, theirs) for ours in (EAGER, COMPILED) for theirs in (NUMPYRO_SCAN, JAX_SCAN)
)


def ratios_of(rows: list[dict], device: str) -> dict[str, float | None]:
    """The ratios of a run, by name."""
    found = {}
    for workload, batch in dict.fromkeys((row["workload"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["workload"], row["batch"]) == (workload, batch)]
        where = f"{workload}, batch {batch}" + (", on the GPU" if "cuda" in device else "")
        found |= {f"{where}: {a} ÷ {b}": ratio(mine, a, b) for a, b in RATIOS}
    return found


def show(rows: list[dict]) -> None:
    print(f"\n{WORKLOADS[rows[0]['workload']].said}, batch {rows[0]['batch']}, {rows[0]['turn']} steps a turn")
    for row in rows:
        print(
            f"  {row['rival']:<32}{row['median']:>8.2f} ms  ({row['q25']:.2f}–{row['q75']:.2f})"
            f"   first turn {row['first_turn_s']:.1f} s"
        )
    said = [f"{a} ÷ {b} = {found:.2f}" for a, b in RATIOS if (found := ratio(rows, a, b)) is not None]
    print("  " + "; ".join(said), flush=True)


# Where the time goes.


NOISE = {f"aten::{name}" for name in ("uniform_", "normal_", "bernoulli_", "exponential_", "multinomial")}


def kind_of(operation: str) -> str:
    """What an operation of the profiler is part of."""
    if operation in ("aten::mm", "aten::addmm", "aten::bmm", "gumbo::product") or "_linear_pointwise" in operation:
        return "matrix products"
    if "_fused_adam" in operation:
        return "Adam"
    if operation in NOISE:
        return "noise"
    if "cpp_fused" in operation:
        return "compiled loops with Adam's update" if "sqrt" in operation else "other compiled loops"
    return "other operations"


def profile(
    name: str, batch_size: int, steps: int = 30, rounds: int = 20, without: Sequence[str] = ()
) -> dict[str, Any]:
    """A workload's milliseconds a step by kind of operation, and those of its matrix products alone."""
    from torch._inductor import config
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, Any] = {"workload": name, "batch": batch_size, "rivals": {}}
    with config.patch({"cpp.enable_kernel_profile": True}):
        rivals = rivals_of(name, batch_size, "cpu", (*without, "jax"))
    for said in (HAND, EAGER, COMPILED):
        if said not in rivals:
            continue
        rival = rivals[said]
        with rival.around():
            rival.steps(10)
            took = spread(interleaved_turns({said: rival}, rounds, 3)[said])["median"]
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                rival.steps(steps)
        kinds: dict[str, float] = {}
        events = seen.key_averages()
        for event in events:
            if event.key.startswith(("aten::", "gumbo::", "mkldnn::")) or "cpp_fused" in event.key:
                kind = kind_of(event.key)
                kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e3 / steps
        kinds["Python and dispatch"] = max(took - sum(kinds.values()), 0.0)
        operations = sum(event.count for event in events if event.key.startswith("aten::")) / steps
        found["rivals"][said] = {"ms": took, "operations": operations, "kinds": kinds}
    times = interleaved_turns(products(name, batch_size, without), rounds, 3)
    found["products"] = {said: median(values) for said, values in times.items()}
    return found


class Products(TorchDispatchMode):
    """Records the factors of every matrix product, as shapes and strides."""

    def __init__(self):
        super().__init__()
        self.found: list[list[tuple[torch.Size, tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default):
            self.found.append([(factor.shape, factor.stride()) for factor in args[-2:]])
        return func(*args, **(kwargs or {}))


def products(name: str, batch_size: int, without: Sequence[str] = ()) -> dict[str, Rival]:
    """The matrix products of a step by hand, forwards and backwards, by the libraries there are."""
    hand = WORKLOADS[name].by_hand(*make_pair(WORKLOADS[name]))
    step = hand_step(hand, make_batch(batch_size), compiled=False)
    with Products() as seen:
        step()
    factors = [[torch.empty_strided(*laid).normal_() for laid in pair] for pair in seen.found]

    def by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")

    def turns(product):
        return Rival(waiting(lambda: [product(a, b) for a, b in factors], "cpu"))

    found = {"torch": turns(torch.mm)}
    if torch.backends.mkldnn.is_available():
        found["oneDNN"] = turns(by_onednn)
    if has_jax("cpu", without):
        import jax
        import jax.numpy as jnp

        # JAX's arrays lie row by row; a transposed factor is one that is transposed where it is multiplied.
        turned = [[factor.stride(0) == 1 < factor.stride(1) for factor in pair] for pair in factors]
        arrays = [
            [jnp.array((factor.T if over else factor).numpy()) for factor, over in zip(*each, strict=True)]
            for each in zip(factors, turned, strict=True)
        ]
        compiled = jax.jit(
            lambda pairs: [
                jnp.matmul(a.T if over[0] else a, b.T if over[1] else b)
                for (a, b), over in zip(pairs, turned, strict=True)
            ]
        )
        found["XLA"] = Rival(waiting(lambda: jax.block_until_ready(compiled(arrays)), "cpu"))
    return found


def show_profile(found: dict[str, Any]) -> None:
    print(f"\nWhere the time goes: {found['workload']}, batch {found['batch']}, ms a step")
    for said, rival in found["rivals"].items():
        kinds = "; ".join(f"{kind} {ms:.2f}" for kind, ms in sorted(rival["kinds"].items(), key=lambda k: -k[1]))
        print(f"  {said}: {rival['ms']:.2f}, of it {kinds} ({rival['operations']:.0f} of torch's operations)")
    print("  the matrix products alone: " + "; ".join(f"{said} {ms:.2f}" for said, ms in found["products"].items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores that all rivals get")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without", nargs="*", choices=["compile", "jax"], default=[], help="rivals to leave out")
    parser.add_argument("--quick", action="store_true", help="batch 32, 3 rounds, nothing compiled")
    parser.add_argument("--profile", action="store_true", help="also say where the time goes, on the CPU")
    parser.add_argument("--out", type=Path, help="the folder of the JSON files")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.rounds, options.without = [32], min(options.rounds, 3), ["compile", *options.without]
    use_cores(options.threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="step-")  # what is compiled is compiled now
    rows: list[dict] = []
    facts = surroundings(options.device) | {"threads": options.threads, "rounds": options.rounds}
    print(f"{facts['device']}; {facts['machine']}")
    folder = options.out or RESULTS
    for name in options.workloads:
        check_same_gradients(WORKLOADS[name], options.device)
        if has_jax(options.device, options.without):
            check_same_gradients_in_jax(name)
        for batch_size in options.batch:
            rows += (found := measure(name, batch_size, options.device, options.rounds, tuple(options.without)))
            show(found)
            write_json(folder / ("step-cuda.json" if "cuda" in options.device else "step.json"), facts | {"rows": rows})
    remember("step", ratios_of(rows, options.device), facts, folder)
    if options.profile and options.device == "cpu":
        found = [
            profile(name, size, without=tuple(options.without)) for name in options.workloads for size in options.batch
        ]
        write_json(folder / "profile.json", facts | {"profiles": found})
        for one in found:
            show_profile(one)


if __name__ == "__main__":
    main()

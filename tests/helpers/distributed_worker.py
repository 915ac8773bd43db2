"""Programs, and a worker that fits them as one of several processes; ``test_processes.py`` starts two of it.

    python tests/helpers/distributed_worker.py JOB OUTPUT      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

Every job is a function of this file; what it returns is written to OUTPUT by the process of rank 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unittest.mock
from datetime import timedelta
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import word_programs
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gumbo import inference
from gumbo.errors import BadInput, GumboError, Interrupted
from gumbo.inference import evaluate, fit
from gumbo.inference.auditing.automatic import Choice
from gumbo.inference.engine.rows import Rows
from gumbo.inference.estimators import GumbelSoftmax, ScoreFunction
from gumbo.inference.estimators.score import Baseline
from gumbo.inference.stock import TraceEnumELBO
from gumbo.inference.training import shared_memory
from gumbo.inference.training.compile import step as compiled_step
from gumbo.inference.training.compile.backends import uncompiled
from gumbo.inference.training.compile.processes import CompiledProcessStep
from gumbo.inference.training.data_parallel import ProcessStep
from gumbo.inference.training.distributed import Processes, SharedInterrupts
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.schedules import Linear
from gumbo.inference.training.shared_memory import SharedMemory
from gumbo.inference.training.steps import TorchStep

F64 = torch.float64
# A look at a batch of another size winds generators back, and cannot wind back the table of :class:`ByRow`.
SiteELBO = partial(inference.SiteELBO, plates="trust")
WIDTH, LATENT, ALL = 3, 2, 40  # ALL is how much data a subsampled plate stands for


class Program(PyroModule):
    """What the programs share: parameters of their own in float64, and the plate over the rows."""

    def __init__(self, scaled: bool = False, **shapes: tuple[int, ...]):
        super().__init__()
        self.scaled = scaled
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape, dtype=F64)))

    def rows(self, x):
        if self.scaled:
            return pyro.plate("rows", ALL, subsample=torch.arange(len(x)), dim=-1)
        return pyro.plate("rows", len(x), dim=-1)


class NormalModel(Program):
    """z ~ N(0, 1), x ~ N(z A + b, 1), row by row."""

    def __init__(self, scaled=False):
        super().__init__(scaled, decoder=(LATENT, WIDTH), shift=(WIDTH,))

    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder + self.shift, 1.0).to_event(1), obs=x)


class UnitModel(NormalModel):
    """The same, with the shift in units of a buffer."""

    def __init__(self, scaled=False):
        super().__init__(scaled)
        self.register_buffer("unit", torch.ones((), dtype=F64))

    def forward(self, x):
        super().forward(x * self.unit)


class NormalGuide(Program):
    def __init__(self, scaled=False):
        super().__init__(scaled, encoder=(WIDTH, LATENT), log_scale=(LATENT,))

    def forward(self, x):
        with self.rows(x):
            pyro.sample("z", dist.Normal(x @ self.encoder, self.log_scale.exp()).to_event(1))


class CoinModel(Program):
    """Coins, and a Normal around what they say, row by row."""

    def __init__(self, scaled=False):
        super().__init__(scaled, prior=(LATENT,), decoder=(LATENT, WIDTH))
        self.width = 1.0

    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder, self.width).to_event(1), obs=x)


class CoinGuide(Program):
    def __init__(self, scaled=False):
        super().__init__(scaled, encoder=(WIDTH, LATENT))

    def forward(self, x):
        with self.rows(x):
            pyro.sample("z", dist.Bernoulli(logits=x @ self.encoder).to_event(1))


class LinearModel(Program):
    """CoinModel with a layer of torch's, whose weight may lie in memory in any order: Pyro's store makes copies."""

    def __init__(self, scaled=False):
        super().__init__(scaled, prior=(LATENT,))
        self.decoder, self.width = nn.Linear(LATENT, WIDTH, dtype=F64), 1.0

    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.width).to_event(1), obs=x)


class LinearGuide(Program):
    def __init__(self, scaled=False):
        super().__init__(scaled)
        self.encoder = nn.Linear(WIDTH, LATENT, dtype=F64)

    def forward(self, x):
        with self.rows(x):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


class LayeredModel(Program):
    """Coins below coins, row by row."""

    def __init__(self, scaled=False):
        super().__init__(scaled, prior=(LATENT,), between=(LATENT, LATENT), decoder=(LATENT, WIDTH))

    def forward(self, x):
        with self.rows(x):
            top = pyro.sample("top", dist.Bernoulli(logits=self.prior).to_event(1))
            z = pyro.sample("z", dist.Bernoulli(logits=top @ self.between).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder, 1.0).to_event(1), obs=x)


class LayeredGuide(Program):
    def __init__(self, scaled=False):
        super().__init__(scaled, encoder=(WIDTH, LATENT), encoder_top=(LATENT, LATENT))

    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", dist.Bernoulli(logits=x @ self.encoder).to_event(1))
            pyro.sample("top", dist.Bernoulli(logits=z @ self.encoder_top).to_event(1))


class SharedModel(Program):
    """A Normal and coins that all rows share, then coins of each row; a term outside the plate that is observed."""

    def __init__(self, scaled=False):
        super().__init__(scaled, decoder=(LATENT, WIDTH), prior=(LATENT,))

    def forward(self, x):
        g = pyro.sample("g", dist.Normal(torch.zeros(WIDTH, dtype=F64), 1.0).to_event(1))
        c = pyro.sample("c", dist.Bernoulli(logits=self.prior).to_event(1))
        pyro.sample("seen", dist.Normal(g.sum(-1) + c.sum(-1), 1.0), obs=torch.tensor(0.7, dtype=F64))
        with self.rows(x):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior + 0 * c).to_event(1))
            pyro.sample("x", dist.Normal((z + c) @ self.decoder + g, 1.0).to_event(1), obs=x)


class SharedGuide(Program):
    def __init__(self, scaled=False):
        super().__init__(scaled, loc=(WIDTH,), log_scale=(WIDTH,), coin=(LATENT,), encoder=(WIDTH, LATENT))

    def forward(self, x):
        pyro.sample("g", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))
        c = pyro.sample("c", dist.Bernoulli(logits=self.coin).to_event(1))
        with self.rows(x):
            pyro.sample("z", dist.Bernoulli(logits=x @ self.encoder + 0.3 * c).to_event(1))


NORMAL, COINS, LAYERS, SHARED = (
    (NormalModel, NormalGuide),
    (CoinModel, CoinGuide),
    (LayeredModel, LayeredGuide),
    (SharedModel, SharedGuide),
)


def shared(c, z="score", **options):
    return SiteELBO({"g": "pathwise", "c": c, "z": z}, **options)


# name: the pair, whether the plate is a subsample of more, and the loss (each process and the reference make their own)
CASES = {
    "pathwise": (NORMAL, False, lambda: SiteELBO("pathwise")),
    "pathwise, K = 3, subsample": (NORMAL, True, lambda: SiteELBO("pathwise", num_particles=3)),
    "stl": (NORMAL, False, lambda: SiteELBO("stl", num_particles=2)),
    "pathwise, KL weight": (NORMAL, True, lambda: SiteELBO("pathwise", kl_weight=Linear(10))),
    "trace": (NORMAL, True, Trace_ELBO),
    "trace-meanfield": (NORMAL, True, TraceMeanField_ELBO),
    "iwae pathwise": (NORMAL, False, lambda: SiteELBO("pathwise", objective="iwae", num_particles=3)),
    "iwae pathwise, subsample": (NORMAL, True, lambda: SiteELBO("pathwise", objective="iwae", num_particles=3)),
    "dreg": (NORMAL, True, lambda: SiteELBO("dreg", objective="iwae", num_particles=3)),
    "renyi": (COINS, True, lambda: SiteELBO("rloo", objective="renyi", alpha=0.5, num_particles=3)),
    "renyi dreg": (NORMAL, False, lambda: SiteELBO("dreg", objective="renyi", alpha=0.5, num_particles=3)),
    "log-variance": (COINS, True, lambda: SiteELBO(objective="log-variance+elbo", num_particles=3)),
    "rws": (NORMAL, False, lambda: SiteELBO(objective="rws", num_particles=3)),
    "VIMCO": (COINS, True, lambda: SiteELBO("rloo", objective="iwae", num_particles=3)),
    "iwae nvil": (COINS, True, lambda: SiteELBO("nvil", objective="iwae", num_particles=4)),
    "trace, coins": (COINS, True, Trace_ELBO),
    "trace-enum": (COINS, True, lambda: TraceEnumELBO(max_plate_nesting=1)),
    **{
        f"coins {word}": (COINS, scaled, lambda word=word: SiteELBO(word))
        for scaled, words in (
            (False, ("score", "rloo", "nvil", "arm", "muprop", "relax", "gumbel-softmax", "enumerate")),
            (True, ("score-average", "disarm", "rebar", "straight-through", "local-expectation", "measure-valued")),
            (True, ("double-cv", "rodeo", "arms")),
        )
        for word in words
    },
    "layers rloo": (LAYERS, True, lambda: SiteELBO("rloo", num_particles=3)),
    "layers nvil": (LAYERS, False, lambda: SiteELBO("nvil")),
    "layers, particle by particle": (LAYERS, True, lambda: SiteELBO("rloo", vectorize_particles=False)),
    "shared score": (SHARED, False, lambda: shared("score")),
    "shared score, subsample": (SHARED, True, lambda: shared("score")),
    "shared rloo": (SHARED, True, lambda: shared("rloo", "rloo", num_particles=3)),
    "shared rloo, particle by particle": (SHARED, False, lambda: shared("rloo", "rloo", vectorize_particles=False)),
    "shared score-average": (SHARED, True, lambda: shared("score-average", "score-average")),
    "shared nvil": (SHARED, True, lambda: shared("nvil", "nvil", num_particles=3)),
    "shared nvil, all rows": (SHARED, False, lambda: shared("nvil", "nvil", num_particles=2)),
    "shared relax": (SHARED, True, lambda: shared("relax", "relax", num_particles=3)),
    "shared arm": (SHARED, True, lambda: shared("arm", "disarm")),
    "shared local-expectation": (SHARED, False, lambda: shared("local-expectation", "rebar")),
    "shared measure-valued": (SHARED, True, lambda: shared("measure-valued", "muprop")),
    "shared double-cv": (SHARED, True, lambda: shared("rloo", "double-cv", num_particles=3)),
    "shared arms": (SHARED, False, lambda: shared("arms", "rodeo", num_particles=2)),
    "shared relaxed": (SHARED, True, lambda: shared(GumbelSoftmax(hard=True), "gumbel-softmax")),
    "shared enumerate": (SHARED, True, lambda: shared("enumerate", "rloo", num_particles=2)),
    "shared, rows enumerated": (SHARED, False, lambda: shared("rloo", "enumerate", num_particles=2)),
}
# Every word on every kind of site that it serves: two dependent sites, masked rows, a subsampled plate.
WORDS = {
    f"{kind} {word}, masked": (
        (lambda scaled, kind=kind: word_programs.Model(kind), lambda scaled, kind=kind: word_programs.Guide(kind)),
        True,
        lambda word=word: SiteELBO(word_programs.said(word), num_particles=2),
    )
    for word, kind, _ in word_programs.cells()
}
CASES |= WORDS
SHORT = (
    *(f"{kind} {word}, masked" for word, kind, quick in word_programs.cells() if quick),
    "pathwise, K = 3, subsample",
    "iwae pathwise, subsample",
    "dreg",
    "VIMCO",
    "renyi",
    "log-variance",
    "coins rloo",
    "coins nvil",
    "coins relax",
    "coins rodeo",
    "shared double-cv",
    "shared rloo",
    "shared nvil",
)
BATCHES = (9, 8, 1)  # five rows and four; four and four; one and none


class ByRow(TorchDispatchMode):
    """Every random number from a table: of the rows at hand where a tensor has rows, and otherwise the same for all.

    A tensor has rows if its second dimension from the right is as long as the batch at hand. A program that runs again
    from an earlier state of torch's generator has the numbers of its first run.
    """

    def __init__(self, seed: int, rows: slice, count: int):
        super().__init__()
        self.seed, self.rows, self.count, self.calls = seed, rows, count, 0
        self.states: dict[bytes, int] = {}  # of torch's generator, with the number of calls before each

    def next_call(self):
        state = torch.get_rng_state().numpy().tobytes()
        self.calls = self.states.setdefault(state, self.calls) + 1
        torch.rand(())

    def uniform(self, like):
        self.next_call()
        here = len(range(*self.rows.indices(self.count)))
        by_row = like.dim() > 1 and like.shape[-2] == here
        shape = (*like.shape[:-2], self.count, like.shape[-1]) if by_row else tuple(like.shape)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.calls)
        table = torch.rand(shape, generator=generator, dtype=F64)
        return (table[..., self.rows, :] if by_row else table).clamp(1e-12, 1 - 1e-12)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded not in func.tags or (kwargs or {}).get("generator") is not None:
            return func(*args, **(kwargs or {}))
        name, like = func.overloadpacket.__name__, args[0]
        if name in ("rand", "randn"):
            with torch.utils._python_dispatch._disable_current_modes():
                u = self.uniform(torch.empty(like, dtype=F64)).to((kwargs or {}).get("dtype") or F64)
            return u if name == "rand" else 2**0.5 * torch.erfinv(2 * u - 1)
        if not isinstance(like, torch.Tensor):  # a bound, which knows of no rows: the same for all
            with torch.utils._python_dispatch._disable_current_modes():
                self.next_call()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1000 * self.seed + self.calls)
                return func(*args, **(kwargs or {}))
        with torch.utils._python_dispatch._disable_current_modes():
            if name == "multinomial":  # of particles and rows in one dimension
                here = len(range(*self.rows.indices(self.count)))
                apart = like.reshape(-1, here if len(like) % here == 0 else 1, like.shape[-1])
                passed = self.uniform(apart[..., :1]) > (apart / apart.sum(-1, keepdim=True)).cumsum(-1)
                return passed.sum(-1, keepdim=True).clamp(max=like.shape[-1] - 1).reshape(len(like), 1)
            u = self.uniform(like)
        if name == "normal_":
            return like.copy_(2**0.5 * torch.erfinv(2 * u - 1))
        if name == "normal":
            return like + args[1] * 2**0.5 * torch.erfinv(2 * u - 1)
        if name == "exponential_":
            return like.copy_(-torch.log(u))
        if name in ("uniform_", "rand_like"):
            return like.copy_(u) if name == "uniform_" else u.to(like.dtype)
        if name == "bernoulli":
            return (u < like).to(like.dtype)
        if name in ("poisson", "binomial", "_standard_gamma"):
            inverse = {"poisson": stats.poisson.ppf, "binomial": stats.binom.ppf, "_standard_gamma": stats.gamma.ppf}
            return torch.as_tensor(inverse[name](u, *args[: 2 if name == "binomial" else 1]), dtype=like.dtype)
        raise NotImplementedError(name)


def data(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(count))


def pair_of(classes, scaled):
    torch.manual_seed(1)
    model, guide = (make(scaled) for make in classes)
    return model, guide


def transposed(pair):
    """The same pair with matrices that lie in memory column by column."""
    for parameter in (p for module in pair for p in module.parameters() if p.dim() == 2):
        parameter.data = parameter.data.t().contiguous().t()
    return pair


def difference(found: dict, wanted: dict) -> float:
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    return max((float((found[name] - wanted[name]).abs().max()) for name in found), default=0.0)


def gradients_of(step) -> dict:
    return {name: p.grad.clone() for name, p in step.parameters.items() if p.grad is not None}


def state_of(step) -> dict:
    """Parameters and moments, which the gradients of all steps have moved."""
    moments = {
        f"{name} {kind}": value.clone()
        for name, parameter in step.parameters.items()
        for kind, value in step.optimizer.optimizer.state[parameter].items()
    }
    return {name: parameter.detach().clone() for name, parameter in step.parameters.items()} | moments


def buffers_of(step) -> dict:
    return {name: value.clone().double() for name, value in step.module.named_buffers()}


def look_at(step, batches) -> None:
    """Look at the programs ahead of the steps, since looks draw numbers too, which would be counted there."""
    for batch in batches:
        if hasattr(step.module, "initialize"):
            step.module.initialize(batch)


def compare(name: str, processes: Processes) -> dict[str, float]:
    """Largest differences between this process of several and one process alone, over three steps on each batch."""
    classes, scaled, make_loss = CASES[name]
    make = make_optimizer("sgd", 1e-5)[0]
    store = pyro.get_param_store()
    with store.scope() as one:
        alone = TorchStep(*pair_of(classes, scaled), make_loss(), make, Rows(data(9)))
        look_at(alone, (data(count) for count in BATCHES))
    with store.scope() as many:
        several = ProcessStep(*pair_of(classes, scaled), make_loss(), make, Rows(data(9)), processes, seed=0)
        look_at(several, (data(count)[several.split.take(count).rows] for count in BATCHES))
    worst = {"gradient": 0.0, "loss": 0.0, "buffers": 0.0, "size": 0.0}
    for turn in range(3):
        for count in BATCHES:
            batch, seed = Rows(data(count)), 100 * turn + count
            with ByRow(seed, slice(0, count), count), store.scope(one) as one:
                loss = alone(batch)
            with ByRow(seed, several.split.take(count).rows, count), store.scope(many) as many:
                found = several(batch)
            wanted = gradients_of(alone)
            worst["loss"] = max(worst["loss"], abs(loss - found))
            worst["gradient"] = max(worst["gradient"], difference(gradients_of(several), wanted))
            worst["buffers"] = max(worst["buffers"], difference(buffers_of(several), buffers_of(alone)))
            worst["size"] = max(worst["size"], *(float(value.abs().max()) for value in wanted.values()))
    return worst


def gradients(names=tuple(CASES)) -> dict:
    processes = Processes.join("cpu")
    return {name: compare(name, processes) for name in names}


def everything_short(folder: Path) -> dict:
    """One job for all that needs two processes, since starting them takes longer than the work."""
    processes = Processes.join("cpu")
    return {
        "gradients": gradients(SHORT),
        "draws": draws(processes),
        "evaluation": evaluation(processes),
        "resumed": resumed(processes, folder),
        "chosen": chosen(processes, folder),
        "changed in main": changed_in_main(processes),
        "mixed": mixed(processes),
        "compiled": compiled(processes, folder),
        "laid out": laid_out(processes),
        "through gloo": through_gloo(processes),
        "memory": in_memory(processes),
        "messages": messages(processes),
        "one fails": one_fails(processes),
        "statistics of its own": said_by(processes, lambda: own_statistics(processes)),
        "depends on rows later": said_by(processes, lambda: depends_on_rows_later(processes)),
        "apart": apart(processes, folder),
        "main fails": said_by(processes, lambda: processes.from_main(refused)),
    }


def step_of(processes: Processes, pair, loss, seed: int = 0):
    make = make_optimizer("sgd", 1e-3)[0]
    return ProcessStep(*pair, loss, make, Rows(data(9)), processes, seed=seed)


def draws(processes: Processes) -> dict:
    """What two processes draw outside the plate and in it, from torch's own generators, in two steps."""
    found: dict[str, list] = {"g": [], "c": [], "z": []}
    with pyro.get_param_store().scope():
        model, guide = pair_of(SHARED, False)
        step = step_of(processes, (model, guide), shared("rloo", "rloo", num_particles=2))
        before = torch.get_rng_state()
        run = step.module.binding._value

        def watched(program, layout, moving, args, kwargs):
            runs = program.runs

            def kept(*inputs, **options):
                groups = runs(*inputs, **options)
                for site in groups[0][0].guide:
                    found[site.name].append(site.value.detach().flatten().tolist())
                return groups

            program.runs = kept
            return run(program, layout, moving, args, kwargs)

        step.module.binding._value = watched
        for _ in range(2):
            step(Rows(data(8)))
        common = [float(value) for value in torch.rand(3)]
        torch.set_rng_state(before)
    return {"drawn": processes.gather(found), "common": processes.gather(common)}


def evaluation(processes: Processes) -> list:
    """What each process finds of 600 rows together with the other, and what it finds alone."""
    model, guide = pair_of(COINS, False)
    found = [evaluate(model, guide, data(600), num_samples=3, processes=every).as_dict() for every in (processes, None)]
    return processes.gather(found)


def mixed(processes: Processes) -> dict:
    """What each process takes for mixed where the second one's look alone finds something."""
    found = {}
    sees = frozenset() if processes.main else frozenset({"inner"})
    for objective in ("elbo", "iwae"):

        def step(objective=objective):
            loss = inference.SiteELBO("rloo", objective=objective, num_particles=2)
            with pyro.get_param_store().scope():
                made = step_of(processes, pair_of(COINS, False), loss)
                made(Rows(data(9)))
            found[objective] = processes.gather(list(made.module.binding.mixed_plates))

        with unittest.mock.patch("gumbo.inference.engine.binding.plates_mixed_by", lambda *_: sees):
            if objective == "elbo":
                step()
            else:
                found[objective] = said_by(processes, step)
    return found


def through_gloo(processes: Processes) -> dict:
    """Gradients where the processes share no memory."""
    with unittest.mock.patch.object(shared_memory, "MOST", 1):
        return {name: compare(name, processes) for name in SHORT[:2]}


def in_memory(processes: Processes) -> list:
    """Whether sums in memory are those of gloo, over several steps; what each process gets where there is none."""
    kinds = [[torch.zeros(5), torch.zeros(2, 3)], [torch.zeros(4, dtype=F64)], [torch.zeros(3, dtype=torch.bfloat16)]]
    memory = SharedMemory.among(processes, 2, [tensor for tensors in kinds for tensor in tensors])
    found: list = [memory is not None]
    if memory is not None:
        generator = torch.Generator().manual_seed(processes.rank)
        for step in range(5):
            own = [[torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors] for tensors in kinds]
            header, sums = memory.add_up([float(step), float(processes.rank)], own)
            for tensors, mine in zip(own, sums, strict=True):
                whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
                everyones = processes.gather(whole.double())
                tolerance = 1e-2 if whole.dtype == torch.bfloat16 else 1e-6
                found.append(torch.allclose(mine.double(), sum(everyones), atol=tolerance, rtol=tolerance))
                found.append(len({tuple(each.tolist()) for each in processes.gather(mine.double())}) == 1)
            count = processes.world_size
            found.append(header.tolist() == [step * count, sum(range(count))])
    missing = {"FOLDER": Path("/dev/null/nowhere"), "MOST": 1, "LARGEST": 100, "_reserved": lambda length: None}
    missing["tempfile"] = unittest.mock.Mock(mkdtemp=unittest.mock.Mock(side_effect=PermissionError))
    for place, value in missing.items():
        with unittest.mock.patch.object(shared_memory, place, value):
            found.append(SharedMemory.among(processes, 2, kinds[0]) is None)
    return processes.gather(found)


def three() -> list:
    return in_memory(Processes.join("cpu"))


def resumed(processes: Processes, folder: Path, **changed) -> dict:
    """A whole run, and one that stops after an epoch and goes on: parameters, history, random streams."""
    found = {}
    for name, epochs in (("whole", (3,)), ("in parts", (1, 3))):
        model, guide = pair_of(COINS, True)
        for index, count in enumerate(epochs):
            options = {"loss": "nvil", "batch_size": 7, "epochs": count, "progress": False, "valid": data(30)} | changed
            result = fit(model, guide, data(33), run_dir=folder / name, resume=index > 0, **options)
        timeless = [{key: v for key, v in one.items() if key[:2] not in ("ms", "se")} for one in result.history]
        digits = [value.flatten().tolist() for module in (model, guide) for value in module.state_dict().values()]
        found[name] = processes.gather([timeless, digits])
    return found


def changed_in_main(processes: Processes) -> dict:
    """Fits whose ``on_epoch``, which only the main process calls, changes the programs: the model in all processes."""

    def scales(model):
        with torch.no_grad():
            model.shift.mul_(0.5)

    def freezes(model):
        model.shift.requires_grad_(False)

    def writes(model):
        model.unit.fill_(0.5)

    def replaces(model):
        model.shift = nn.Parameter(model.shift.detach().clone())

    def breaks(model):
        replaces(model)
        raise ZeroDivisionError("of the user")

    def reshapes(model):
        model.unit = torch.ones(2, dtype=F64)

    def fitted(change=None, at=1, epochs=2, compile=False) -> dict[str, list[float]]:
        model, guide = pair_of((UnitModel, NormalGuide), True)
        options = {"epochs": epochs, "batch_size": 8, "progress": False, "compile": compile, "seed": 3}
        hook = None if change is None else lambda numbers: change(model) if numbers["epoch"] == at else None
        with pyro.get_param_store().scope():
            fit(model, guide, data(24), loss="pathwise", on_epoch=hook, **options)
        return {name: value.flatten().tolist() for name, value in model.state_dict().items()}

    found: dict[str, list] = {"untouched": processes.gather(fitted()), "an epoch": processes.gather(fitted(epochs=1))}
    found["scales"] = processes.gather(fitted(scales, at=2))
    found["writes"] = processes.gather(fitted(writes))
    for compile in (False, True):
        found[f"freezes, compile={compile}"] = processes.gather(fitted(freezes, compile=compile))
    for change in (replaces, reshapes):
        found[change.__name__] = said_by(processes, lambda: fitted(change))  # noqa: B023
    try:
        fitted(breaks)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return found | {"breaks": processes.gather(said)}


def chosen(processes: Processes, folder: Path) -> dict:
    """What ``auto`` chooses in a run of both processes, of which the second would choose otherwise."""
    found, measured = [], []
    choose = inference.Auto.choose

    def own(chooser, *args):
        measured.append(processes.main)
        return choose(chooser, *args) if processes.main else Choice({"z": "score"})

    for number in (1, 2):  # a run, and one that goes on with it
        model, guide = pair_of(COINS, True)
        chooser = inference.Auto(draws=8, candidates=["score", "rloo", "arms"], quiet=True)
        loss = SiteELBO(chooser, num_particles=2)
        running = {"batch_size": 7, "epochs": number, "progress": False, "run_dir": folder / "chosen"}
        with unittest.mock.patch.object(inference.Auto, "choose", own):
            fit(model, guide, data(33), loss=loss, resume=number == 2, **running)
        digits = [value.flatten().tolist() for module in (model, guide) for value in module.state_dict().values()]
        found.append(processes.gather([loss.choice.words, digits]))
    kept = json.loads((folder / "chosen" / "estimators.json").read_text())
    return {"runs": found, "measured": processes.gather(measured), "kept": [one["words"] for one in kept]}


def messages(processes: Processes) -> list:
    """The collective operations of a step with its look for signals, and what a signal to the second one does."""
    with pyro.get_param_store().scope():
        step = step_of(processes, pair_of(COINS, False), SiteELBO("rloo", num_particles=2))
        interrupts, found = SharedInterrupts(processes), []
        for _ in range(3):  # states are compared after the first and the second
            before = processes.num_collectives
            step(Rows(data(8)))
            interrupts.check()
            found.append(processes.num_collectives - before)
        interrupts.pending = None if processes.main else 15
        step(Rows(data(8)))
        interrupts.pending = None  # it came in time for the step's message
        try:
            interrupts.check()
        except Interrupted as error:
            found.append(error.signal)
        interrupts.check()
    return processes.gather(found)


@unittest.mock.patch.object(compiled_step, "inductor", uncompiled)
def compiled(processes: Processes, folder: Path) -> dict:
    """Compiled steps of both processes beside eager ones of one; a run that goes on; what is refused."""
    make, store = make_optimizer("adam", 1e-3)[0], pyro.get_param_store()
    found: dict = {}
    for name, scaled in (("scaled", True), ("unscaled", False)):
        with store.scope() as one:
            own = pair_of(COINS, scaled)
            alone = TorchStep(*own, SiteELBO("enumerate"), make, Rows(data(9)))
        with store.scope() as many:
            pair = pair_of(COINS, scaled)
            several = CompiledProcessStep(*pair, SiteELBO("enumerate"), make, Rows(data(9)), processes, seed=0)
        found[name] = []
        for count, width in ((9, 1.0), (9, 1.0), (6, 1.0), (9, 1.0), (9, 2.0)):
            own[0].width = pair[0].width = width
            drawn = several.part.noise.draw = unittest.mock.Mock()
            with store.scope(one) as one:
                loss = alone(Rows(data(count)))
            with store.scope(many) as many:
                gap = abs(loss - several(Rows(data(count))))
            wanted = gradients_of(alone)
            size = max(float(value.abs().max()) for value in wanted.values())
            apart = difference(state_of(several), state_of(alone))
            found[name].append(
                {
                    "graph": drawn.called and several.update is not None,
                    "captures": several.part.captures,
                    "loss": gap,
                    "state": apart,
                    "size": size,
                }
            )
            for step in (alone, several):
                step.optimizer.optimizer.param_groups[0]["weight_decay"] = 0.1 * len(found[name])
    found["resumed"] = resumed(processes, folder / "compiled", loss="rloo", compile=True, batch_size=8)

    def fitted(classes, loss, x):
        fit(*pair_of(classes, False), x, loss=loss, compile=True, batch_size=8, epochs=1, progress=False)

    found["refused"] = [
        said_by(processes, lambda: fitted(SHARED, shared("rloo", "rloo", num_particles=2), data(16))),
        said_by(processes, lambda: fitted(COINS, SiteELBO("score-average"), data(16))),
        said_by(processes, lambda: fitted((PositiveModel, NormalGuide), SiteELBO("pathwise"), spoilt())),
    ]
    return found


@unittest.mock.patch.object(compiled_step, "inductor", uncompiled)
def laid_out(processes: Processes) -> list[dict[str, float]]:
    """How far training of both processes is from itself where matrices lie in memory column by column."""
    found = {}
    for word, compile in (("adam", False), ("adam", True), ("sgd", False), ("sgd", True)):
        ends = []
        for laid in (lambda pair: pair, transposed):
            pair = laid(pair_of((LinearModel, LinearGuide), False))
            options = {"optimizer": word, "lr": 0.01, "compile": compile, "progress": False}
            fit(*pair, data(33), loss="enumerate", batch_size=9, epochs=2, **options)
            ends.append(
                {f"{i} {name}": value for i, one in enumerate(pair) for name, value in one.state_dict().items()}
            )
        found[f"{word}{' compiled' if compile else ''}"] = difference(*ends)
    return processes.gather(found)


class PositiveModel(NormalModel):
    """Its data must be positive."""

    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT, dtype=F64), 1.0).to_event(1))
            law = dist.LogNormal(z @ self.decoder + self.shift, 1.0)
            pyro.sample("x", law.to_event(1), obs=x)


def spoilt() -> torch.Tensor:
    """Positive data, with one value that is not, in a row of the first batch's second half or later."""
    x = data(16).abs() + 0.1
    x[-1] = -1.0
    return x


class Sentinel(NormalModel):
    """Fails on rows of nines."""

    def forward(self, x):
        if (x == 9.0).any():
            raise RuntimeError("nines")
        super().forward(x)


def said_by(processes: Processes, action) -> list[str]:
    said = "nothing"
    try:
        action()
    except GumboError as error:
        said = f"{type(error).__name__}: {error}"
    return processes.gather(said)


def one_fails(processes: Processes) -> list[str]:
    torch.manual_seed(1)
    with pyro.get_param_store().scope():
        step = step_of(processes, (Sentinel(), NormalGuide()), SiteELBO("pathwise"))
        batch = data(9)
        batch[-1] = 9.0
        said = []
        try:
            step(Rows(batch))
        except (GumboError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        step(Rows(data(9)))  # nobody is left waiting
    return processes.gather(said)


class DrawnAnew(torch.utils.data.Dataset):
    """Rows with noise of a generator of its own, which each process seeds in its own way."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int):
        return data(12)[number] + torch.randn(WIDTH, dtype=F64, generator=self.generator)


APART = {
    "values": {"train": data(12) + 1},
    "length": {"train": data(13)},
    "stored values": {"train": torch.utils.data.TensorDataset(data(12) + 1)},
    "valid": {"valid": data(5)},
    "epochs": {"epochs": 2},
    "batch_size": {"batch_size": 5},
    "lr": {"lr": 0.5},
    "schedule": {"lr": lambda step: 0.1 / (2 + step)},
    "patience": {"patience": 3, "valid": data(4)},
    "run_dir": {"run_dir": None},
    "frozen": {"frozen": True},
    "drawn anew": {"train": DrawnAnew(1)},
}
MAIN = {
    "stored values": {"train": torch.utils.data.TensorDataset(data(12))},
    "schedule": {"lr": lambda step: 0.1 / (1 + step)},
    "patience": {"valid": data(4)},
    "drawn anew": {"train": DrawnAnew(0)},
}


def apart(processes: Processes, folder: Path) -> dict[str, list[str]]:
    """What is said of processes of which the second has other data or settings."""

    def fitted(train=None, frozen=False, **options):
        model, guide = pair_of(NORMAL, False)
        model.shift.requires_grad_(not frozen)
        common = {"batch_size": 4, "epochs": 1, "loss": "pathwise", "progress": False}
        fit(model, guide, data(12) if train is None else train, **common | options)

    found = {}
    for name, other in APART.items():
        options = MAIN.get(name, {}) if processes.main else other
        if name == "run_dir":
            options = {"run_dir": folder / "apart"} | options
        found[name] = said_by(processes, lambda options=options: fitted(**options))
    return found


class OwnMean(Baseline):
    """Keeps statistics of the rows at hand, whoever else there is."""

    def make_state(self, inputs):
        state = nn.Module()
        state.register_buffer("mean", torch.zeros((), dtype=F64))
        return state

    def __call__(self, view):
        baseline = view.state.mean.clone()
        view.state.mean.copy_(view.cost.mean())
        return baseline


def own_statistics(processes: Processes) -> None:
    with pyro.get_param_store().scope():
        step = step_of(processes, pair_of(COINS, False), SiteELBO(ScoreFunction(baseline=OwnMean())))
        for _ in range(3):
            step(Rows(data(9)))


class SharedByRows(SharedGuide):
    """What all rows share depends on the rows, once the weight is no longer zero."""

    weight = 0.0

    def forward(self, x):
        self.loc.data.fill_(self.weight * x.mean())
        super().forward(x)


def depends_on_rows_later(processes: Processes) -> None:
    torch.manual_seed(1)
    with pyro.get_param_store().scope():
        guide = SharedByRows()
        step = step_of(processes, (SharedModel(), guide), shared("rloo", "rloo"))
        step(Rows(data(9)))
        guide.weight = 1.0
        step(Rows(data(9)))


def hangs() -> dict:
    """The second process does not come to the sum; the first gives up after the timeout."""
    processes = Processes.join("cpu", timeout=timedelta(seconds=3))
    memory = SharedMemory.among(processes, 1, [torch.ones(3)])
    if not processes.main:
        time.sleep(12)
        return {}
    found = {}
    sums = {"gloo": lambda: processes.all_reduce(torch.ones(3))}
    if memory is not None:
        sums["memory"] = lambda: memory.add_up([1.0], [[torch.ones(3)]])
    for name, summed in sums.items():
        began = time.monotonic()
        try:
            summed()
        except GumboError as error:
            found[name] = {"said": str(error), "seconds": time.monotonic() - began}
    return found


def refused():
    raise BadInput("the main process says no")


def main() -> None:
    torch.set_num_threads(1)
    job, output = sys.argv[1:]
    found = globals()[job](*([Path(output).parent] if job == "everything_short" else []))
    if os.environ["RANK"] == "0":
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

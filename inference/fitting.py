"""The training loop: steps, validation, early stop, checkpoints, and runs that resume to the same numbers."""

from __future__ import annotations

import copy
import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.optim
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO

from ..errors import BadInput, GumboError
from .checkpoints import load_checkpoint, save_checkpoint, write_whole
from .evaluation import evaluate
from .gradients import is_differentiable
from .isolation import (
    denormals_flushed,
    device_of,
    devices_of,
    modes_kept,
    owned_parameters,
    private_seed,
    shared_names,
)
from .optimizers import make_optimizer
from .progress import make_progress
from .rows import Rows
from .steps import StoreStep, TorchStep


@dataclass
class FitResult:
    """What :func:`fit` did.

    ``history`` has one dict an epoch: ``epoch``, ``step``, the training objective per datum under its own name
    (``objective_name``), ``valid_elbo`` (the true bound, nats per datum) where there was validation data,
    ``ms_per_step`` (median) and ``seconds``. With validation data, entry 0 is the state before the first step.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    objective_name: str = "elbo"
    best_epoch: int | None = None
    best_elbo: float | None = None
    ms_per_step: float = math.nan
    stopped_early: bool = False

    @property
    def epochs(self) -> int:
        return int(self.history[-1]["epoch"]) if self.history else 0


def fit(
    model: torch.nn.Module,
    guide: torch.nn.Module,
    train: object,
    *,
    valid: object = None,
    loss: ELBO | str = "default",
    optimizer: str | pyro.optim.PyroOptim | Callable[..., torch.optim.Optimizer] = "adam",
    lr: float = 1e-3,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    patience: int | None = None,
    restore_best: bool = False,
    drop_last: bool | None = None,
    transform: Callable[[Any, torch.Generator], Any] | None = None,
    valid_samples: int = 10,
    checkpoint_every: int = 1,
    validate: bool = False,
    progress: bool = True,
    title: str = "fit",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Train a model and guide in place; the same arguments give the same numbers, interrupted or not.

    ``train`` and ``valid`` are a tensor ``(N, *data_shape)``, a tuple of such tensors, or a mapping of keywords.
    ``loss`` is any ELBO or its word. ``optimizer`` is a word (with ``lr``), a ``pyro.optim`` optimizer, or a callable
    that takes parameters and returns a torch optimizer. ``transform(batch, generator)`` makes of a training batch, in
    the form ``train`` has, what the programs take (dynamic binarization, conditions from labels). ``drop_last=None``
    drops a last partial batch just where the loss keeps something for each batch position. ``patience`` stops after
    that many epochs without a better ``valid_elbo``; ``restore_best`` leaves the parameters of the best epoch rather
    than of the last.

    The first batch runs under Pyro's validation, and every row is held against its site's support once (in each epoch
    where ``transform`` or ``drop_last`` shows other rows); ``validate=True`` keeps all of Pyro's validation on.

    Losses with a differentiable scalar run in torch's idiom; the others (stock TraceGraph_ELBO) as ``SVI.step`` does.
    Both run in a scope of the param store and under generators of their own: the store and the seeds stay as they are.
    ``run_dir`` receives ``metrics.jsonl`` and ``checkpoints/last.pt`` (parameters, optimizer, random state, baselines,
    best so far); ``resume=True`` goes on from there, with as many epochs as are asked for and all else unchanged.

    Raises :class:`~gumbo.errors.BadInput` for data or settings that cannot be used, and for a run folder that holds
    another run; :class:`~gumbo.errors.GumboError` naming the parameter or site when the loss stops being finite.

    >>> from gumbo.models import GaussianVAE
    >>> from gumbo.guides import NormalGuide
    >>> from pyro.infer import Trace_ELBO
    >>> model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,))
    >>> x = torch.zeros(16, 1, 4, 4)
    >>> guide = NormalGuide(model, hidden=(8,))
    >>> result = fit(model, guide, x, loss=Trace_ELBO(), epochs=3, batch_size=8, progress=False)
    >>> result.epochs, result.history[-1]["elbo"] > result.history[0]["elbo"]
    (3, True)
    """
    for name, program in (("model", model), ("guide", guide)):
        if not isinstance(program, torch.nn.Module):
            raise BadInput(
                f"fit trains modules, and the {name} is a {type(program).__name__}: put it into a PyroModule, "
                "or use pyro.infer.SVI with the same loss"
            )
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise BadInput(f"{name} is {value}: expected at least 1")
    if (patience is not None or restore_best) and valid is None:
        raise BadInput("patience and restore_best choose by validation data: pass valid=")
    rows = Rows(train, "train").check("train")
    valid_rows = None if valid is None else Rows(valid, "valid").check("valid")
    loss, loss_name = _make_loss(loss)
    if drop_last is None:
        drop_last = keeps_batch_positions(loss)
    if drop_last and len(rows) < batch_size:
        raise BadInput(
            f"train has {len(rows)} rows: with drop_last, a batch of {batch_size} is never full; lower batch_size"
        )
    make, optimizer_name = make_optimizer(optimizer, lr)
    batches = _Batches(rows, batch_size, seed, drop_last, transform, device_of(model, guide))
    settings = {
        "loss": loss_name,
        "optimizer": optimizer_name,
        "batch_size": batch_size,
        "seed": seed,
        "drop_last": drop_last,
        "train": _fingerprint(rows),
        "valid": None if valid_rows is None else _fingerprint(valid_rows),
    }
    with (
        pyro.get_param_store().scope(),
        private_seed(seed, model, guide),
        modes_kept(model, guide),
        denormals_flushed(),
    ):
        run = _Run(model, guide, loss, make, batches, valid_rows, valid_samples, settings, run_dir)
        run.step.validate = validate
        run.begin(resume)
        return run.go(epochs, patience, restore_best, checkpoint_every, progress, title, on_epoch)


class _Batches:
    """The training batches of each epoch: a function of seed and epoch alone, so that there is no state to lose."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, drop_last: bool, transform, device: torch.device):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.transform, self.device = transform, device
        self.per_epoch = len(rows) // batch_size if drop_last else math.ceil(len(rows) / batch_size)

    @property
    def show_other_rows(self) -> bool:
        """Whether a later epoch may hold values that the first did not."""
        return self.transform is not None or self.per_epoch * self.batch_size < len(self.rows)

    def of_epoch(self, epoch: int):
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.rows), generator=generator)
        for number in range(self.per_epoch):
            yield self._batch(order[number * self.batch_size : (number + 1) * self.batch_size], generator)

    def first(self) -> Rows:
        """A batch to initialise with."""
        return self._batch(torch.arange(min(self.batch_size, len(self.rows))), torch.Generator().manual_seed(self.seed))

    def _batch(self, index: torch.Tensor, generator: torch.Generator) -> Rows:
        batch = self.rows[index]
        if self.transform is not None:
            batch = Rows(self.transform(batch.data, generator), "transform's result")
        return batch.to(self.device)


class _Run:
    """The loop and what it must remember: everything here that changes is in the checkpoint."""

    def __init__(self, model, guide, loss, make_optimizer, batches, valid, valid_samples, settings, run_dir):
        self.model, self.guide, self.batches, self.valid = model, guide, batches, valid
        self.valid_samples = valid_samples
        self.folder = None if run_dir is None else Path(run_dir)
        if shared := shared_names(model, guide):
            raise BadInput(
                f"model and guide both have a parameter {shared[0]!r}: in Pyro's param store they would train as one; "
                "rename one of the networks"
            )
        for name, parameter in owned_parameters(model, guide).items():
            if not torch.nn.parameter.is_lazy(parameter) and not torch.isfinite(parameter).all():
                raise BadInput(f"parameter {name!r} is not finite before the first step")
        kind = TorchStep if is_differentiable(loss) else StoreStep
        self.step = kind(model, guide, loss, make_optimizer, batches.first())
        shapes = {name: list(parameter.shape) for name, parameter in self.step.parameters.items()}
        self.settings = settings | {"parameters": zlib.crc32(json.dumps(shapes).encode())}
        self.objective_name = getattr(getattr(self.step, "module", loss), "objective_name", "elbo")
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"epoch": None, "elbo": None, "module": {}}
        self.milliseconds: list[float] = []

    @property
    def checkpoint(self) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoints" / "last.pt"

    def begin(self, resume: bool) -> None:
        """Start afresh or from the checkpoint."""
        if resume and self.folder is None:
            raise BadInput("resume=True needs the run_dir of the run to go on with")
        if self.folder is not None:
            if self.checkpoint.exists():
                if not resume:
                    raise BadInput(f"{self.folder} holds a run already: pass resume=True to go on, or another run_dir")
                self._load()
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self.history and self.valid is not None:
            self._record({"epoch": 0, "step": 0, **self._validate()})
        self._rewrite_metrics()

    def go(self, epochs, patience, restore_best, checkpoint_every, progress, title, on_epoch) -> FitResult:
        first = int(self.history[-1]["epoch"]) + 1 if self.history else 1
        stopped = self._out_of_patience(patience)
        with make_progress(progress, title, epochs, epochs * self.batches.per_epoch) as shown:
            for epoch in range(first, epochs + 1):
                if stopped:
                    break
                numbers = self._epoch(epoch, shown)
                self._record(numbers)
                stopped = self._out_of_patience(patience)
                if self.folder is not None:
                    with open(self.folder / "metrics.jsonl", "a") as file:
                        file.write(json.dumps(numbers) + "\n")
                    if epoch % checkpoint_every == 0 or epoch == epochs or stopped:
                        self._save()
                shown.epoch(epoch, numbers)
                if on_epoch is not None:
                    on_epoch(numbers)
        if restore_best and self.best["module"]:
            self.step.load({"module": self.best["module"], "store": {}})
        return FitResult(
            self.history,
            self.objective_name,
            self.best["epoch"],
            self.best["elbo"],
            median(self.milliseconds) if self.milliseconds else math.nan,
            stopped,
        )

    def _epoch(self, epoch: int, shown) -> dict[str, float]:
        began, total, seen, took = time.perf_counter(), 0.0, 0, []
        before = (epoch - 1) * self.batches.per_epoch
        self.step.check_data = epoch == 1 or self.batches.show_other_rows
        for number, batch in enumerate(self.batches.of_epoch(epoch), start=1):
            start = time.perf_counter()
            try:
                loss = self.step(batch)
            except (ValueError, RuntimeError) as error:
                # Pyro's own validation speaks of a distribution's argument; the cause is the parameter behind it.
                self._stop_if_broken(epoch, before + number, batch, math.nan, error)
                raise
            took.append(1e3 * (time.perf_counter() - start))
            if not math.isfinite(loss):
                self._stop_if_broken(epoch, before + number, batch, loss)
            total, seen = total - loss, seen + len(batch)
            shown.step(before + number)
        self._stop_if_parameters_broken(epoch, before + self.batches.per_epoch)
        self.milliseconds += took
        numbers = {"epoch": epoch, "step": before + self.batches.per_epoch, self.objective_name: total / seen}
        if self.valid is not None:
            numbers |= self._validate()
        return numbers | {"ms_per_step": median(took), "seconds": time.perf_counter() - began}

    def _validate(self) -> dict[str, float]:
        found = evaluate(self.model, self.guide, self.valid, num_samples=self.valid_samples, seed=self.batches.seed)
        return {"valid_elbo": found.elbo}

    def _record(self, numbers: dict[str, float]) -> None:
        self.history.append(numbers)
        elbo = numbers.get("valid_elbo")
        if elbo is not None and (self.best["elbo"] is None or elbo > self.best["elbo"]):
            module = copy.deepcopy(self.step.state()["module"])
            self.best = {"epoch": int(numbers["epoch"]), "elbo": elbo, "module": module}

    def _out_of_patience(self, patience: int | None) -> bool:
        if patience is None or self.best["epoch"] is None or not self.history:
            return False
        return self.history[-1]["epoch"] - self.best["epoch"] >= patience

    def _rewrite_metrics(self) -> None:
        # Lines of epochs after the checkpoint would otherwise stand twice.
        if self.folder is not None:
            lines = "".join(json.dumps(numbers) + "\n" for numbers in self.history)
            write_whole(self.folder / "metrics.jsonl", lambda file: file.write(lines.encode()))

    def _save(self) -> None:
        devices = devices_of(self.model, self.guide)
        state = {
            **self.step.state(),
            "optimizer": self.step.optimizer.state_dict(),
            "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)],
            "history": self.history,
            "best": self.best,
            "milliseconds": self.milliseconds,
            "settings": self.settings,
        }
        save_checkpoint(self.checkpoint, state)

    def _load(self) -> None:
        state = load_checkpoint(self.checkpoint, self.batches.device)
        differing = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if differing:
            key = differing[0]
            raise BadInput(
                f"{self.folder} holds a run of another configuration: {', '.join(differing)} differ "
                f"({key}: {state['settings'].get(key)} there, {self.settings[key]} here); use another run_dir"
            )
        self.step.load(state)
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.history, self.best, self.milliseconds = state["history"], state["best"], state["milliseconds"]
        torch.set_rng_state(state["random"][0].cpu())
        for device, random in zip(devices_of(self.model, self.guide), state["random"][1:], strict=True):
            torch.cuda.set_rng_state(random.cpu(), device)

    def _stop_if_parameters_broken(self, epoch: int, step: int, cause: Exception | None = None) -> None:
        for name, parameter in self.step.parameters.items():
            if not torch.isfinite(parameter).all():
                raise GumboError(
                    f"training stopped at epoch {epoch}, step {step}: parameter {name!r} is no longer finite; "
                    f"lower the learning rate{self._advice()}"
                ) from cause

    def _stop_if_broken(self, epoch: int, step: int, batch: Rows, loss: float, cause: Exception | None = None) -> None:
        self._stop_if_parameters_broken(epoch, step, cause)
        if cause is not None:
            return
        site = _broken_site(self.model, self.guide, batch)
        where = (
            f"site {site!r} has a log-probability that is not finite" if site else "every site of a new draw is finite"
        )
        raise GumboError(f"training stopped at epoch {epoch}, step {step}: the loss is {loss}; {where}{self._advice()}")

    def _advice(self) -> str:
        if self.folder is None or not self.checkpoint.exists():
            return ""
        return f"; {self.checkpoint} still holds the last good epoch"


def keeps_batch_positions(loss: ELBO) -> bool:
    """Whether the loss keeps a number for each position in a batch, so that a shorter batch would not fit it."""
    from .stock import TraceGraphBaselineELBO

    return isinstance(loss, TraceGraphBaselineELBO)


def _make_loss(loss: ELBO | str) -> tuple[ELBO, str]:
    """The ELBO, and words that tell it from another one."""
    if isinstance(loss, str):
        from .stock import make_loss

        return make_loss(loss), loss
    if not isinstance(loss, ELBO):
        raise BadInput(f"loss is {type(loss).__name__}: expected an ELBO or its word, such as 'rloo' or 'trace'")
    if type(loss).__repr__ is not object.__repr__:
        return loss, repr(loss)
    return loss, f"{type(loss).__name__}(num_particles={loss.num_particles})"


def _fingerprint(rows: Rows) -> str:
    tensors = [*rows.args, *rows.kwargs.values()]
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), checksum)
    return f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)} {checksum:08x}"


def _broken_site(model: Callable, guide: Callable, batch: Rows) -> str | None:
    """The first site of a fresh run whose log-probability is not finite."""
    with torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch.args, **batch.kwargs)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not torch.isfinite(site["fn"].log_prob(site["value"])).all():
                    return name
    return None

"""``fit``: train a model and a guide in place, with checkpoints, validation and reproducible resumption."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.optim
import torch
from pyro.infer import ELBO, TraceGraph_ELBO
from pyro.nn import PyroModule

from ...errors import BadInput, GumboError, GumboWarning, first_line
from ..elbo import SiteELBO
from ..engine.rows import Rows, about_arguments
from ..engine.scopes import (
    denormals_flushed,
    device_of,
    modes_kept,
    modules_of,
    one_at_a_time,
    owned_parameters,
    private_seed,
    shared_names,
)
from ..engine.stored_rows import StoredRows, rows_in
from ..stock import is_differentiable, objective_name
from .annealing import Annealing
from .batches import TRANSFORMED, Batches
from .checkpoints import Checkpoints
from .choices import Choices
from .compile.products import FASTEST
from .distributed import Processes
from .fingerprints import described, fingerprint
from .inspection import Inspection, inspect_programs, parameter_of_rows, refuse_parameter_of_rows
from .optimizers import make_optimizer, without_addresses
from .schedules import Schedule
from .settings import FitSettings
from .steps import Step, StoreStep, TorchStep
from .stored_batches import batches_of
from .trainer import FitResult, Run


def fit(
    model: Callable,
    guide: Callable,
    train: object,
    *,
    valid: object = None,
    loss: ELBO | str = "default",
    optimizer: str | pyro.optim.PyroOptim | Callable[..., torch.optim.Optimizer] = "adam",
    lr: float | Schedule = 1e-3,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    scheduler_every: str = "epoch",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    patience: int | None = None,
    until: str | None = None,
    restore_best: bool = False,
    drop_last: bool | None = None,
    transform: Callable[[Any, torch.Generator], Any] | None = None,
    valid_samples: int = 10,
    checkpoint_every: int = 1,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float | None = None,
    tensorboard: bool = False,
    validate: bool = False,
    compile: bool = False,
    products: str = "fastest",
    progress: bool = True,
    title: str = "fit",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    anneal: Mapping[str, Schedule | str | float] | None = None,
) -> FitResult:
    r"""Train a model and a guide in place; the same arguments give the same numbers, interrupted or not.

    A differentiable loss runs as a torch module; other losses (stock TraceGraph_ELBO) run as ``SVI.step`` does. The
    run has its own param-store scope and random generators: the caller's seeds and store do not change, except that
    parameters of ``pyro.param`` that no module owns have their trained values in the store afterwards. Concurrent calls
    from several threads run one after the other.

    With a ``run_dir``, SIGINT and SIGTERM stop the run after the current step: the run is saved, and
    :class:`~gumbo.errors.Interrupted` (a KeyboardInterrupt) is raised. Under ``torchrun`` or ``accelerate launch`` the
    processes fit one model together: each batch is split by rows, gradients are summed over the processes, and the main
    process writes files, shows progress and calls ``on_epoch`` (docs/several-processes.md lists what is refused).

    Args:
        model, guide: Pyro programs: modules, functions, bound methods (``vae.model, vae.guide``). ``fit`` trains the
            parameters that they register by ``pyro.module``, by ``pyro.param`` or as a module's parameters.
        train: the arguments of the programs. A tuple holds the positional arguments, a mapping the keywords, anything
            else is the single argument (wrap an argument that is itself a tuple or a mapping in a tuple). N is the
            number of rows of the first tensor; tensors (and NumPy arrays) with N rows are cut into batches, everything
            else (a PackedSequence, None, a number, a list, other tensors) is passed whole. Without an argument with
            rows, every step uses all data. Memory-mapped arrays stay in their files. A torch Dataset is read batch by
            batch, in the form of its collated items; a DataLoader gives its data set, batch size, collate function,
            workers and pinned memory, and ``fit`` draws the order. A DataLoader with a custom sampler, or of an
            IterableDataset, keeps its order (docs/runs.md says what a resumed run then needs).
        valid: validation data in the same form, with its own number of rows.
        loss: an ELBO, or its word.
        optimizer: a word or a torch optimizer's class (with ``lr``), a callable that makes a torch optimizer from a
            list of parameters, or a ``pyro.optim`` optimizer, with arguments by parameter name and schedules if any.
        lr: the learning rate, or a schedule of the step.
        scheduler: makes a ``torch.optim.lr_scheduler`` from the optimizer; ReduceLROnPlateau receives minus
            ``valid_elbo`` (without validation data, minus the training objective).
        scheduler_every: ``"epoch"``, or ``"step"`` to advance the scheduler after every step.
        clip_norm: a bound on the norm of the gradient of all parameters together.
        clip_value: a bound on each element of the gradients.
        epochs: the number of epochs; for a resumed run, the total.
        batch_size: rows per step.
        seed: the seed of the batch order and of the draws.
        run_dir: a folder for ``metrics.jsonl``, ``checkpoints/last.pt`` and the one before it as ``previous.pt``
            (parameters, optimizer, random state, baselines, place in the epoch, best so far), the best parameters as
            ``best.pt``, and ``estimators.json`` with the estimators that ``auto`` selected.
        resume: continue from the last checkpoint in ``run_dir``; only ``epochs`` and options that do not change the
            numbers may differ. A damaged checkpoint gives a warning, and the one before it is used.
        patience: stop after that many epochs without a better ``valid_elbo``, counted from the end of the loss's
            schedules (KL warm-up, temperatures).
        until: ``"converged"`` stops, without validation data, when the iterates at a constant learning rate are
            stationary (R̂ of their last windows at most 1.1) and the Monte Carlo standard error of their average is
            at most 0.02 max(1, \|average\|) in every coordinate; the average is the result. The test starts after
            the loss's schedules end, runs at the ends of epochs, and prints its numbers; ``epochs`` is the maximum.
            The weights of a network drift along flat directions: use this for guides with few parameters (Dhaka et al.
            2020, arXiv:2009.00666; Welandawe et al. 2022, arXiv:2203.15945).
        restore_best: keep the parameters of the best epoch instead of the last.
        drop_last: drop a partial last batch; None does so where the loss keeps state for each batch position.
        transform: ``transform(batch, generator)`` maps a training batch, in the form of ``train``, to the arguments of
            the programs (dynamic binarization, conditions from labels); all its random draws use the generator.
        valid_samples: draws per datum for ``valid_elbo``.
        checkpoint_every: epochs between checkpoints; the first is written before the first step.
        checkpoint_steps: also write a checkpoint after that many steps.
        checkpoint_minutes: also write a checkpoint after that many minutes.
        tensorboard: also write scalars under ``tensorboard/`` in ``run_dir``.
        validate: keep Pyro's validation on for every step. By default only the first batch runs under validation, and
            every row is checked against its site's support once (in each epoch where ``transform`` or ``drop_last``
            changes the rows; sites whose distribution has ``validate_args=False`` are not checked).
        compile: compile the loss, its gradient and Adam to one graph. Compilation takes some seconds and needs a C++
            compiler; it pays for long runs of small networks. Programs with value-dependent control flow are refused;
            batches of another size than ``batch_size`` run uncompiled.
        products: the library of a compiled step's large matrix products on the CPU: ``"torch"`` (torch's default),
            ``"onednn"``, or ``"fastest"``, which measures both on this machine, takes oneDNN where it saves a tenth,
            and keeps the choice in the checkpoint for resumed runs.
        progress: show progress on standard error.
        title: the prefix of the progress lines.
        on_epoch: called with each epoch's numbers, before the checkpoint of the epoch, which holds the parameters,
            buffers and freezing that it changes.
        anneal: a schedule of the step, or its text, for each buffer of model or guide that changes in training, such
            as ``{"success": "step(900, 0.1, 1e-6)"}`` of `AttendInferRepeat`. ``valid_elbo`` is that of the
            model at the last step's values, and ``patience`` counts from the end of these schedules too.

    Returns:
        A :class:`FitResult`: the numbers of each epoch, in nats per datum (per datum of the whole data under a plate
        that subsamples), and the best epoch.

    Raises:
        BadInput: data, programs or settings that cannot be used; a run folder of another run; a guide with parameters
            for each row of a batch and more than one batch.
        GumboError: a loss that is not finite (the message names the parameter or site), or a file that cannot be
            written.
        Interrupted: a signal stopped a run with a ``run_dir``.

    >>> from gumbo.models import GaussianVAE
    >>> from gumbo.guides import NormalGuide
    >>> from pyro.infer import Trace_ELBO
    >>> model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,))
    >>> x = torch.zeros(16, 1, 4, 4)
    >>> guide = NormalGuide(model, hidden=(8,))
    >>> settings = dict(loss=Trace_ELBO(), batch_size=8, clip_norm=10.0, run_dir="run", progress=False)
    >>> fit(model, guide, x, epochs=2, **settings).epochs
    2
    >>> result = fit(model, guide, x, epochs=3, resume=True, **settings)
    >>> result.epochs, result.history[-1]["elbo"] > result.history[0]["elbo"]
    (3, True)
    """
    given = dict(locals())
    _refuse_programs(model, guide)
    options = FitSettings.of(given)
    if (options.patience is not None or options.restore_best) and valid is None:
        raise BadInput("patience and restore_best choose by validation data: pass valid=")
    rows = rows_in(train, "train", streams=True)
    options = _with_the_loaders(options, rows)
    seed = options.seed
    if not _is_stream(rows):
        rows.check("train")
    if not isinstance(rows, StoredRows) and any(tensor.requires_grad for tensor in rows.tensors()):
        rows = rows.without_gradients()
    valid_rows = None if valid is None else rows_in(valid, "valid").check("valid")
    annealing = Annealing(options.anneal or {}, model, guide)
    loss, loss_name = _make_loss(loss)
    device = _device_of(model, guide, rows)
    batches_in = partial(batches_of, rows, transform=transform, device=device)
    first, found = _first_look(model, guide, rows, valid_rows, batches_in, options)
    model, guide = found.model, found.guide
    if options.compile:
        _refuse_complex(model, guide)
    drop_last = _drops_last(options, loss, rows, found)
    processes = Processes.join(device)
    make, optimizer_name = make_optimizer(optimizer, lr, clip_norm, clip_value, scheduler, scheduler_every, found.names)
    if processes is not None and isinstance(rows, StoredRows) and rows.source.own_order:
        raise BadInput(
            "several processes split batches that all of them see, and this DataLoader has an order of its own: pass "
            "its data set, whose order is drawn here"
        )
    batches = batches_in(options.batch_size, seed, drop_last)
    batches.in_order = found.of_rows is not None
    identity = options.deciding() | {
        "loss": loss_name,
        "loss_options": _options_of(loss),
        "optimizer": optimizer_name,
        "drop_last": drop_last,
        "train": fingerprint(rows),
        "valid": None if valid_rows is None else fingerprint(valid_rows),
        "processes": 1 if processes is None else processes.world_size,
        "anneal": without_addresses(annealing.schedules) if annealing.schedules else None,
    }
    if processes is not None:
        anew = _drawn_anew(train=rows, valid=valid_rows)
        processes.compare(options.common() | identity | anew | _layout(model, guide))
    with (
        one_at_a_time,
        found.trained(),
        pyro.get_param_store().scope(),
        private_seed(seed, model, guide),
        modes_kept(model, guide),
        denormals_flushed(),
    ):
        choices = None
        if isinstance(loss, SiteELBO) and loss.undecided:
            speaks = options.progress and (processes is None or processes.main)
            choices = Choices(loss, options.folder, processes, speaks)
            model.train()
            guide.train()
            loss = choices.settle(model, guide, batches, resume, compile)
        library = _library(options)
        step = _make_step(model, guide, loss, make, first, library, processes, seed)
        if library is not None:
            identity["products"] = step.products  # type: ignore[attr-defined]
        step.validate, step.unchecked = validate, found.unchecked
        objective = getattr(getattr(step, "module", loss), "objective_name", None) or objective_name(loss)
        run = Run(
            model, guide, step, batches, valid_rows, options, identity, objective, processes, found.num_data, annealing
        )
        run.choices = choices
        if processes is not None:
            processes.compare(run.identity | anew)
        try:
            run.begin()
            return run.go()
        finally:
            run.end()
            batches.close()


def _first_look(
    model: Callable,
    guide: Callable,
    rows: Rows,
    valid_rows: Rows | None,
    batches_in: Callable[..., Batches],
    options: FitSettings,
) -> tuple[Rows, Inspection]:
    """The first batch, and what the programs are found to do with it; raises BadInput where they cannot be trained."""
    with one_at_a_time, private_seed(options.seed, model, guide):
        first = batches_in(options.batch_size, options.seed).first()
        of_rows = None
        if options.batch_size == 1 < _number_of(rows):
            # With one row, a parameter of that row has the shape of a shared one.
            of_rows = parameter_of_rows(model, guide, batches_in(2, options.seed).first(), options.seed)
        found = _inspected(model, guide, first, options.seed, of_rows)
    refuse_parameter_of_rows(found, options.batch_size, _number_of(rows))
    if found.of_rows is not None and valid_rows is not None and fingerprint(valid_rows) != fingerprint(rows):
        raise BadInput(
            f"parameter {found.of_rows!r} has elements for each row of train and none for those of valid: "
            "leave valid out"
        )
    return first, found


def _refuse_complex(model: Callable, guide: Callable) -> None:
    """Raise BadInput for parameters that torch's compiler does not take, frozen or not."""
    for name, parameter in owned_parameters(model, guide).items():
        if parameter.is_complex():
            remedy = "pass compile=False" if parameter.requires_grad else "make it a buffer, or pass compile=False"
            raise BadInput(f"parameter {name!r} is complex, and complex parameters are not compiled: {remedy}")


def _drawn_anew(**named: Rows | None) -> dict[str, str]:
    """The lengths of data sets that give other rows at each reading, by name: processes cannot compare more of them."""
    return {
        name: f"{len(rows)} rows, others at each reading"
        for name, rows in named.items()
        if isinstance(rows, StoredRows) and fingerprint(rows) != fingerprint(rows)
    }


def _layout(model: Callable, guide: Callable) -> dict[str, str]:
    """The shapes and dtypes of the programs' parameters, by name, and whether they learn."""
    return {
        f"parameter {name!r}": f"{tuple(one.shape)} {one.dtype}{'' if one.requires_grad else ', frozen'}"
        for name, one in owned_parameters(model, guide).items()
        if not torch.nn.parameter.is_lazy(one)
    }


def _drops_last(options: FitSettings, loss: ELBO, rows: Rows, found: Inspection) -> bool:
    """Whether a last partial batch is dropped; raises BadInput if no batch would be left."""
    drop_last, number = options.drop_last, _number_of(rows)
    if drop_last is None:
        drop_last = keeps_batch_positions(loss) or (
            number > options.batch_size and isinstance(loss, TraceGraph_ELBO) and found.averages
        )
    if drop_last and number < options.batch_size:
        raise BadInput(
            f"train has {number} rows: with drop_last, a batch of {options.batch_size} is never full; lower batch_size"
        )
    return drop_last


def _number_of(rows: Rows) -> int:
    """The number of rows; a stream counts as endless."""
    return sys.maxsize if _is_stream(rows) else len(rows)


def _is_stream(rows: Rows) -> bool:
    """Whether the rows are a stream, without a length or random access."""
    return isinstance(rows, StoredRows) and rows.source.iterable


def _with_the_loaders(options: FitSettings, rows: Rows) -> FitSettings:
    """The settings with the DataLoader's batch size and its ``drop_last``.

    Raises BadInput for a ``batch_size`` that contradicts the DataLoader's.
    """
    loader = rows.source.loader if isinstance(rows, StoredRows) else None
    if loader is None or loader.batch_size is None:
        return options
    usual = next(item.default for item in fields(FitSettings) if item.name == "batch_size")
    if options.batch_size not in (usual, loader.batch_size):
        raise BadInput(
            f"batch_size is {options.batch_size} and the DataLoader's is {loader.batch_size}: leave batch_size out"
        )
    drop_last = options.drop_last if options.drop_last is not None or not loader.drop_last else True
    return replace(options, batch_size=loader.batch_size, drop_last=drop_last)


def keeps_batch_positions(loss: ELBO) -> bool:
    """Whether the loss keeps a number for each position in a batch, so that a shorter batch does not fit it."""
    from ..stock import TraceGraphBaselineELBO

    return isinstance(loss, TraceGraphBaselineELBO)


def _device_of(model: Callable, guide: Callable, rows: Rows) -> torch.device:
    """The device of the programs' parameters; without known parameters, the device of the data."""
    programs = [getattr(program, "__self__", program) for program in (model, guide)]
    modules = [module for module in modules_of(*programs) if next(module.parameters(), None) is not None]
    if modules or modules_of(*programs):
        return device_of(*modules)
    return next((tensor.device for tensor in rows.tensors()), torch.device("cpu"))


def _inspected(model: Callable, guide: Callable, batch: Rows, seed: int, of_rows: str | None) -> Inspection:
    with _explained(batch, model, guide):
        try:
            found = inspect_programs(model, guide, batch, seed)
        except GumboError:
            raise
        except Exception:
            if len(modules_of(model, guide)) < 2:
                raise
            return Inspection(model, guide)  # the loss may run programs that need enumeration
    if not any(parameter.requires_grad for parameter in owned_parameters(found.model, found.guide).values()):
        raise BadInput(
            "model and guide have no parameter to train: register networks by pyro.module, or use pyro.param"
        )
    return found if of_rows is None else replace(found, of_rows=of_rows)


def _make_loss(loss: ELBO | str) -> tuple[ELBO, str]:
    """The ELBO, and a description that differs between ELBOs with different settings."""
    if isinstance(loss, str):
        from ..stock import make_loss

        return make_loss(loss), loss
    if not isinstance(loss, ELBO):
        raise BadInput(f"loss is {type(loss).__name__}: expected an ELBO or its word, such as 'rloo' or 'trace'")
    if type(loss).__repr__ is object.__repr__:
        return loss, f"{type(loss).__name__}(num_particles={loss.num_particles})"
    # The word does not show options that were set on the estimator afterwards, such as a temperature.
    chosen = [*getattr(loss, "given", {}).values(), getattr(loss, "otherwise", None)]
    return loss, without_addresses([loss, *chosen] if any(chosen) else loss)


_SHOWN = {"num_particles", "max_plate_nesting", "retain_graph", "strict_enumeration_warning"}  # or without effect


def _options_of(loss: ELBO) -> str | None:
    """The plain options of an ELBO of Pyro's or of the caller's, which its ``repr`` does not show; None without any."""
    if type(loss).__repr__ is not object.__repr__:
        return None
    taken = {name for kind in type(loss).__mro__ for name in inspect.signature(kind.__init__).parameters} - _SHOWN
    held = {name: getattr(loss, name) for name in sorted(taken) if name in vars(loss)}
    held = {name: value for name, value in held.items() if isinstance(value, (bool, int, float, str))}
    return repr(held) if held else None


def _refuse_programs(model: Callable, guide: Callable) -> None:
    """Raise BadInput for programs that cannot be trained with any data."""
    for name, program in (("model", model), ("guide", guide)):
        if isinstance(program, type) or not callable(program):
            what = f"the class {program.__name__}" if isinstance(program, type) else f"a {type(program).__name__}"
            raise BadInput(f"the {name} is {what}: expected a Pyro program, a function, a bound method or a module")
    if shared := shared_names(model, guide):
        raise BadInput(
            f"model and guide both have a parameter {shared[0]!r}: in Pyro's param store they would train as one; "
            "rename one of the networks"
        )
    for name, dtype in _whole_numbers(model, guide):
        raise BadInput(
            f"parameter {name!r} is {dtype}, and Pyro has every parameter that a PyroModule itself holds learn: make "
            "it a buffer, by register_buffer"
        )
    for name, parameter in owned_parameters(model, guide).items():
        if not torch.nn.parameter.is_lazy(parameter) and not torch.isfinite(parameter).all():
            raise BadInput(f"parameter {name!r} is not finite before the first step")


def _whole_numbers(*programs: Callable) -> Iterator[tuple[str, torch.dtype]]:
    """The parameters of whole numbers that PyroModules hold themselves: Pyro's store fails on them."""
    for program in modules_of(*programs):
        for path, module in program.named_modules():
            for name, one in module._parameters.items() if isinstance(module, PyroModule) else ():
                if one is not None and not (one.is_floating_point() or one.is_complex()):
                    yield f"{path}.{name}".removeprefix("."), one.dtype


def _make_step(
    model, guide, loss: ELBO, make: Callable, batch: Rows, library: str | None, processes: Processes | None, seed: int
) -> Step:
    """The Step class that the loss needs, compiled if there is a ``library`` for its products.

    Raises BadInput for programs that fail on the batch, and for losses of Pyro's that have no value to report.
    """
    objective_name(loss)
    kind: Callable[..., Step] = TorchStep if is_differentiable(loss) else StoreStep
    if library is not None:
        from .compile.step import CompiledStep  # imported here: torch's compiler is slow to load

        kind = partial(CompiledStep, products=library)
    if processes is not None:
        if kind is StoreStep:
            raise BadInput(
                f"{type(loss).__name__} takes gradients itself, in one process: take one of SiteELBO's words, or start "
                "one process"
            )
        if library is not None:
            from .compile.processes import CompiledProcessStep

            kind = partial(CompiledProcessStep, processes=processes, seed=seed, products=library)
        else:
            from .data_parallel import ProcessStep

            kind = partial(ProcessStep, processes=processes, seed=seed)
    with _explained(batch, model, guide):
        return kind(model, guide, loss, make, batch)


def _library(options: FitSettings) -> str | None:
    """The library that a compiled step is asked to take: a resumed run keeps its own. None without ``compile``."""
    if not options.compile:
        return None
    if options.products == FASTEST and options.resume and options.folder is not None:
        # Run.begin reads it again, and says what is wrong with it.
        with suppress(GumboError, LookupError, TypeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", GumboWarning)
            return Checkpoints(options.folder / "checkpoints").load()["settings"]["products"]
    return options.products


@contextmanager
def _explained(batch: Rows, model: Callable, guide: Callable) -> Iterator[None]:
    """Turn an error of the programs on the first batch into a one-line BadInput."""
    try:
        yield
    except GumboError:
        batch.check(TRANSFORMED)
        raise
    except Exception as error:
        batch.check(TRANSFORMED)
        raise BadInput(
            f"the programs cannot run on a batch of train, {described(batch)}: {first_line(error)}"
            f"{about_arguments(error) or _about_dtypes(batch, model, guide)}"
        ) from error


def _about_dtypes(batch: Rows, *programs: Callable) -> str:
    """A hint where the dtype of the data differs from that of the parameters."""
    learned = (p for program in modules_of(*programs) for p in program.parameters())
    wanted = next((p.dtype for p in learned if p.is_floating_point()), None)
    given = [tensor.dtype for tensor in batch.tensors() if tensor.dtype != wanted]
    if wanted is None or not given:
        return ""
    return f"; the parameters are {wanted} and the data {given[0]}: convert one of them"

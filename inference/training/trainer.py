"""The training loop, and the state that it needs to resume."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import torch

from ...errors import BadInput, GumboError, GumboWarning, Interrupted
from ...tables import html
from ..engine.progress import Progress, make_progress
from ..engine.rows import Rows
from ..engine.scopes import devices_of, random_states, set_random_states
from ..posterior.evaluation import Evaluator
from .annealing import Annealing
from .batches import TRANSFORMED, Batches
from .checkpoints import Checkpoints
from .choices import Choices
from .convergence import Convergence
from .data_parallel import ProcessStep
from .distributed import OnMain, Processes, SharedInterrupts
from .fingerprints import values_of_schedules
from .locks import FolderLock
from .metrics import Metrics, Scalars
from .nonfinite import Guard
from .settings import FitSettings
from .signals import Interrupts
from .steps import Step

# Keys of a run's identity that the checkpoints of earlier versions lack.
NOT_FROM_THE_FIRST = ("dtypes", "loss_options", "optimizer_groups", "scheduler_every", "schedules")


@dataclass(repr=False)
class FitResult:
    """The result of :func:`fit`.

    ``history`` has one dict per epoch: ``epoch``, ``step``, the training objective per datum under its own name
    (``objective_name``), the values that the objective reports beside it (``elbo`` of ``log-variance``), ``valid_elbo``
    (the ELBO, nats per datum) with validation data, ``lr`` if it is scheduled, ``ms_per_step`` (median) and
    ``seconds``. With validation data, entry 0 is the state before the first step. The attribute ``ms_per_step`` is the
    median over epochs. ``converged`` says whether ``until="converged"`` was reached, and is None without ``until``;
    epochs that ran the test have ``rhat`` and, of the average, ``mcse`` and ``ess``. ``repr`` shows the last epoch's
    numbers.

    >>> FitResult([{"epoch": 0, "valid_elbo": -9.0}, {"epoch": 1, "elbo": -7.5, "valid_elbo": -7.25}], best_epoch=1)
    FitResult(epochs=1, elbo=-7.5, valid_elbo=-7.25, best_epoch=1, stopped_early=False)
    """

    history: list[dict[str, float]] = field(default_factory=list)
    objective_name: str = "elbo"
    best_epoch: int | None = None
    best_elbo: float | None = None
    ms_per_step: float = math.nan
    stopped_early: bool = False
    converged: bool | None = None

    @property
    def epochs(self) -> int:
        return int(self.history[-1]["epoch"]) if self.history else 0

    def _shown(self) -> dict[str, str]:
        last = self.history[-1] if self.history else {}
        shown = {"epochs": self.epochs}
        shown |= {name: last[name] for name in (self.objective_name, "elbo", "valid_elbo") if name in last}
        shown |= {"best_epoch": self.best_epoch, "best_elbo": self.best_elbo, "ms_per_step": self.ms_per_step}
        shown = {name: value for name, value in shown.items() if value is not None and value == value}
        shown["stopped_early"] = self.stopped_early
        shown |= {} if self.converged is None else {"converged": self.converged}
        return {name: f"{value:.6g}" if isinstance(value, float) else f"{value}" for name, value in shown.items()}

    def __repr__(self) -> str:
        return f"FitResult({', '.join(f'{name}={value}' for name, value in self._shown().items())})"

    def _repr_html_(self) -> str:
        """The numbers of ``repr`` as a table, for notebooks."""
        return html(["fit", "value"], list(self._shown().items()))


@dataclass
class _Epoch:
    """The progress of the current epoch: batches before it and in it, the objective summed over its rows.

    ``took`` is the time of each batch in ms, ``seconds`` the total.
    """

    number: int = 1
    before: int = 0
    done: int = 0
    total: float = 0.0
    seen: int = 0
    took: list[float] = field(default_factory=list)
    seconds: float = 0.0
    reported: dict[str, float] = field(default_factory=dict)  # further values of the objective, summed


class _Source:
    """The batches of an epoch for stretches of steps; a pending signal ends a stretch after its current step.

    ``prepare(number, batch)`` is called before the step of that number, of which ``done`` were made.

    Attributes: ``last`` batch; ``seconds`` that reading took in this stretch; ``error``, raised by the reading itself.
    """

    def __init__(
        self, batches: Iterator[Rows], interrupts: Interrupts, prepare: Callable[[int, Rows], None], done: int
    ):
        self.batches, self.interrupts, self.prepare, self.done = batches, interrupts, prepare, done
        self.error: Exception | None = None
        self.last = Rows(())
        self.begin()

    def begin(self) -> None:
        """Begin another stretch."""
        self.seconds, self._given = 0.0, 0

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        if self._given and self.interrupts.pending is not None:
            raise StopIteration
        start = time.perf_counter()
        try:
            self.last = next(self.batches)
            self.prepare(self.done, self.last)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise
        self.seconds += time.perf_counter() - start
        self.done, self._given = self.done + 1, self._given + 1
        return self.last


class Run:
    """Steps, validation, checkpoints. The checkpoint holds all state that changes here, at the end of every step.

    ``identity`` distinguishes this run from others: a folder with another identity is refused. ``num_data`` is the
    number of data that the loss of a batch counts, None where that is the batch's length. With several ``processes``
    all make the same run; the main one writes files and prints.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        guide: torch.nn.Module,
        step: Step,
        batches: Batches,
        valid: Rows | None,
        options: FitSettings,
        identity: dict[str, Any],
        objective_name: str,
        processes: Processes | None = None,
        num_data: int | None = None,
        annealing: Annealing | None = None,
    ):
        self.num_data = num_data
        self.annealing = annealing or Annealing({}, model, guide)
        self.model, self.guide, self.step, self.batches = model, guide, step, batches
        self.valid, self.options, self.folder = valid, options, options.folder
        folder = self.folder
        self.objective_name, self.processes = objective_name, processes
        self.identity = identity | self._identity_of_step()
        self.guard = Guard(model, guide, step.parameters)
        self.choices: Choices | None = None
        self.evaluator: Evaluator | None = None
        self._validates_eagerly = ""  # why it does, where the step is compiled
        self.shown: Progress | None = None
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"epoch": None, "elbo": None, "module": {}}
        if options.restore_best:
            step.keep_first_buffers()
        self.now = _Epoch()
        self.convergence = Convergence(step.parameters) if options.until is not None else None
        self.settles, self.waits_for = 0, ""
        if options.patience is not None or self.convergence is not None:
            horizon = options.epochs * (batches.per_epoch or 1_000)
            self.settles, self.waits_for = max(step.settles(horizon), self.annealing.settles(horizon))
        self.made_on = {"threads": torch.get_num_threads(), "device": batches.device.type}
        if folder is not None:
            self.checkpoints: Any = Checkpoints(folder / "checkpoints")
            self.metrics: Any = Metrics(folder)
            self.lock = FolderLock(folder)
            if processes is not None:
                self.checkpoints = OnMain(processes, self.checkpoints)
                self.metrics = OnMain(processes, self.metrics)
        self.speaks = processes is None or processes.main
        self._best_is_saved = True
        self._saved_at = self._began = time.perf_counter()

    def _identity_of_step(self) -> dict[str, Any]:
        """What distinguishes a run by its parameters, its optimizer and its schedules."""
        parameters, optimizer = self.step.parameters, self.step.optimizer
        shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        dtypes = {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in parameters.items()}
        kinds = ", ".join(sorted(set(dtypes.values())))
        found = {
            "parameters": zlib.crc32(json.dumps(shapes).encode()),
            "dtypes": f"{kinds} {zlib.crc32(json.dumps(dtypes).encode()):08x}",
            "optimizer_groups": optimizer.groups,
        }
        found["schedules"] = values_of_schedules(
            [
                *self.step.schedules(),
                ("lr", self.options.lr),
                *(("scheduler", one) for one in getattr(optimizer.scheduler, "lr_lambdas", [])),
                *self.annealing.schedules.items(),
            ]
        )
        return found | ({"scheduler": optimizer.started_as} if optimizer.started_as else {})

    def begin(self) -> None:
        """Start afresh, or from the checkpoint; raises here if the folder is not writable."""
        if self.folder is None:
            return
        if self.processes is None:
            self.lock.acquire()
        else:
            self.processes.from_main(self.lock.acquire)
        if self.checkpoints.exist():
            if not self.options.resume:
                raise BadInput(f"{self.folder} holds a run already: pass resume=True to resume it, or another run_dir")
            self._load()
            if self.best["epoch"] is not None:
                self.checkpoints.save_best(self.best)  # a crash may have occurred between the checkpoint and this
        else:
            self._save()
        if self.choices is not None:
            self.choices.keep_until((self.now.number - 1) * self.batches.per_epoch + self.now.done)
            self.choices.write()
        self.metrics.rewrite(self.history)

    def end(self) -> None:
        """Release the folder."""
        if self.folder is not None:
            self.lock.release()

    def go(self) -> FitResult:
        options = self.options
        steps = options.epochs * (self.batches.per_epoch or 0)
        with ExitStack() as stack:
            interrupts = stack.enter_context(self._interrupts())
            shown = stack.enter_context(
                make_progress(options.progress and self.speaks, options.title, options.epochs, steps)
            )
            self.shown = shown
            for note in filter(None, (self.step.note, self.batches.note, self._waiting())):
                shown.begin(note)
            if self.folder is not None:
                done = self.now.number - 1
                finished = done >= options.epochs
                rest = f"with {done} epochs done: nothing to train" if finished else f"from {self._where()}"
                shown.begin(f"into {self.folder} {rest}")
            scalars = None
            if options.tensorboard and self.folder is not None and self.speaks:
                scalars = Scalars(self.folder, int(self.history[-1]["step"]) if self.history else None)
                stack.callback(scalars.close)
            try:
                self._epochs(interrupts, shown, scalars)
                interrupts.check()
            except Interrupted as error:
                with interrupts.ignored():
                    self._save()
                advice = f"; saved in {self.folder}: the same call with resume=True resumes from there"
                raise Interrupted(error.signal, self._where(), advice) from None
        if self.convergence is not None and not self.convergence.converged:
            shown.begin(f"not converged after {self.now.before} steps: {self.convergence.verdict}")
        stopped = self._out_of_patience() or self._converged()
        if options.restore_best and self.best["module"]:
            self.step.load_best(self.best)
        times = [numbers["ms_per_step"] for numbers in self.history if "ms_per_step" in numbers]
        return FitResult(
            self.history,
            self.objective_name,
            self.best["epoch"],
            self.best["elbo"],
            median(times) if times else math.nan,
            stopped,
            None if self.convergence is None else self.convergence.converged,
        )

    def _waiting(self) -> str:
        """The message that says from which step on stopping is considered."""
        return (
            ""
            if not self.settles
            else f"stopping is considered from step {self.settles} on, when {self.waits_for} has come to its end"
        )

    def _interrupts(self) -> Interrupts:
        kept = self.folder is not None
        return Interrupts(kept) if self.processes is None else SharedInterrupts(self.processes, kept)

    def _epochs(self, interrupts: Interrupts, shown: Progress, scalars: Scalars | None) -> None:
        options = self.options
        if not self.history:
            self.annealing.before(0)
        if self.valid is not None and not self.history:
            with interrupts.at_once():
                numbers = {"epoch": 0, "step": 0, **self._validate()}
            self._record(numbers, scalars)
        while self.now.number <= options.epochs and not self._out_of_patience() and not self._converged():
            self._steps(interrupts, shown)
            with interrupts.at_once():
                numbers = self._numbers()
            if self.convergence is not None:
                self._look(self.convergence, numbers, shown)
            self.step.optimizer.end_epoch(-numbers.get("valid_elbo", numbers[self.objective_name]))
            self.now = _Epoch(self.now.number + 1, self.now.before + self.now.done)
            self._record(numbers, scalars)
            shown.epoch(int(numbers["epoch"]), numbers)
            self._end_epoch(numbers)

    def _end_epoch(self, numbers: dict[str, float]) -> None:
        """Call ``on_epoch``, and then save where it is due, so that the checkpoint holds what was changed there."""
        if self.options.on_epoch is None:
            self._save_epoch(int(numbers["epoch"]))
            return
        try:
            self._call_on_epoch(self.options.on_epoch, numbers)
        except BaseException as error:
            if self.processes is None or isinstance(error, Exception):  # else the others have not heard of it
                with suppress(GumboError):  # the error of on_epoch is the one to tell
                    self._save_epoch(int(numbers["epoch"]), changed=True)
            raise
        self._save_epoch(int(numbers["epoch"]), changed=True)

    def _call_on_epoch(self, function: Callable[[dict[str, float]], None], numbers: dict[str, float]) -> None:
        """Call ``on_epoch``: on several processes in the main one, and the others take over what it changes."""
        if isinstance(self.step, ProcessStep):
            self.step.change_in_main(lambda: function(numbers))
        else:
            function(numbers)

    def _save_epoch(self, epoch: int, changed: bool = False) -> None:
        options = self.options
        if changed:  # a checkpoint of other programs could not be resumed
            check = self.step.check_parameters
            check() if self.processes is None else self.processes.together(check)
        if self.folder is not None and (
            epoch % options.checkpoint_every == 0
            or epoch == options.epochs
            or self._out_of_patience()
            or self._converged()
        ):
            self._save()

    def _steps(self, interrupts: Interrupts, shown: Progress) -> None:
        """Make the remaining steps of the epoch."""
        now, before = self.now, self.now.before
        self._began = time.perf_counter() - now.seconds
        self.step.check_data = now.number == 1 or self.batches.show_other_rows
        self.step.code_between = self.batches.runs_code
        interrupts.check()

        def prepare(number: int, batch: Rows) -> None:
            if self.choices is not None:
                self.choices.before(number, batch, self.step)
            self.annealing.before(number)

        source = _Source(self.batches.of_epoch(now.number, now.done), interrupts, prepare, before + now.done)
        while True:
            made: list[tuple[Rows, float]] = []
            source.begin()
            start = time.perf_counter()
            error: Exception | None = None
            try:
                self.step.stretch(source, made, self._most(before + now.done))
            except Exception as raised:
                error = raised
            end = time.perf_counter()
            self._count(made, (end - start - source.seconds) / max(len(made), 1))
            if error is not None:
                if error is not source.error and isinstance(error, (ValueError, RuntimeError)):
                    self._explain(error, self.step.failed_on or source.last)
                raise error
            if not made:
                break
            shown.step(before + now.done)
            interrupts.check()
            if self._is_due(before + now.done, end):
                self._save()
        self.guard.after_step(self._where())

    def _most(self, done: int) -> int:
        """The number of steps that may be made after ``done`` before somebody looks at the programs or the run."""
        every = self.options.checkpoint_steps
        most = sys.maxsize if every is None else every - done % every
        if self.convergence is not None:  # it sees every iterate
            most = min(most, max(self.settles - done, 1))
        return most

    def _count(self, made: list[tuple[Rows, float]], seconds: float) -> None:
        """Count steps that were made, each in so many seconds; raises GumboError for a loss that is not finite."""
        now = self.now
        for batch, loss in made:
            if not math.isfinite(loss):
                batch.check(TRANSFORMED)
                self.guard.explain(loss, f"epoch {now.number}, step {now.before + now.done + 1}", batch)
            if self.convergence is not None and now.before + now.done >= self.settles:
                self.convergence.after_step()
            now.took.append(1e3 * seconds)
            now.total -= self._of_rows(loss, batch)
            for name, value in self.step.reported().items():
                now.reported[name] = now.reported.get(name, 0.0) + self._of_rows(value, batch)
            now.seen += len(batch)
            now.done += 1

    def _explain(self, error: Exception, batch: Rows) -> None:
        """Raise GumboError where a parameter or site that is not finite explains an error of a step; else return.

        Pyro's validation names a distribution's argument; the cause is the parameter that computes it.
        """
        where = f"epoch {self.now.number}, step {self.now.before + self.now.done + 1}"
        self.guard.after_step(where, error)
        batch.check(TRANSFORMED)  # the data were checked before
        if not isinstance(error, GumboError):
            self.guard.explain_error(error, where, batch)

    def _of_rows(self, value: float, batch: Rows) -> float:
        """A batch's value scaled to a sum over its own rows."""
        return value if self.num_data is None else value * len(batch) / self.num_data

    def _is_due(self, step: int, moment: float) -> bool:
        """Whether a checkpoint is due within the epoch."""
        steps, minutes = self.options.checkpoint_steps, self.options.checkpoint_minutes
        if steps is not None and step % steps == 0:
            return self.folder is not None
        if minutes is None or self.folder is None:
            return False
        due = moment - self._saved_at >= 60 * minutes
        return due if self.processes is None else bool(self.processes.largest(due and self.speaks))

    def _where(self) -> str:
        return f"epoch {self.now.number}, step {self.now.before + self.now.done}"

    def _numbers(self) -> dict[str, float]:
        """The numbers of the epoch."""
        now, lr = self.now, self.step.optimizer.lr
        if not now.seen:
            raise BadInput(f"train gave no batch in epoch {now.number}: expected at least one")
        numbers: dict[str, float] = {"epoch": now.number, "step": now.before + now.done}
        numbers[self.objective_name] = now.total / now.seen
        numbers |= {name: value / now.seen for name, value in now.reported.items()}
        if self.valid is not None:
            numbers |= self._validate_trained(self.valid)
        if lr is not None:
            numbers["lr"] = lr
        return numbers | {"ms_per_step": median(now.took), "seconds": time.perf_counter() - self._began}

    def _validate(self) -> dict[str, float]:
        if self.evaluator is None:
            draws = {"num_samples": self.options.valid_samples, "num_local_samples": 1}
            self.evaluator = Evaluator(self.model, self.guide, self.valid, **draws, compiler=self.step.compiler)
        before = self._validates_eagerly
        found = {"valid_elbo": self.evaluator(self.batches.seed, self.processes, False).elbo}
        self._validates_eagerly = self.evaluator.uncompiled
        if self._validates_eagerly and not before and self.shown is not None:
            self.shown.begin(f"validation runs uncompiled: {self._validates_eagerly}")
        return found

    def _validate_trained(self, valid: Rows) -> dict[str, float]:
        """`_validate` after steps: the data passed before, so an error comes from the parameters."""
        try:
            return self._validate()
        except (GumboError, ValueError, RuntimeError) as error:
            size = self.batches.batch_size
            for start in range(0, len(valid), size):
                rows = valid[start : start + size].to(self.batches.device)
                self.guard.explain_error(error, self._where(), rows)
            raise

    def _record(self, numbers: dict[str, float], scalars: Scalars | None) -> None:
        self.history.append(numbers)
        elbo = numbers.get("valid_elbo")
        if elbo is not None and (self.best["elbo"] is None or elbo > self.best["elbo"]):
            state = self.step.state()
            kept = copy.deepcopy({name: state[name] for name in ("module", "buffers")})
            self.best = {"epoch": int(numbers["epoch"]), "elbo": elbo, **kept}
            self._best_is_saved = False
        if self.folder is not None:
            self.metrics.append(numbers)
        if scalars is not None:
            scalars.epoch(numbers)

    def _out_of_patience(self) -> bool:
        patience = self.options.patience
        if patience is None or self.best["epoch"] is None or not self.history:
            return False
        # While a schedule changes, the objective changes: an epoch that is no better gives no information.
        settled = next((numbers["epoch"] for numbers in self.history if numbers["step"] >= self.settles), None)
        return settled is not None and self.history[-1]["epoch"] - max(self.best["epoch"], settled) >= patience

    def _converged(self) -> bool:
        return self.convergence is not None and self.convergence.converged

    def _look(self, convergence: Convergence, numbers: dict[str, float], shown: Progress) -> None:
        """Test for convergence; when it is reached, set the parameters to the average."""
        convergence.look()
        if convergence.said:
            numbers |= convergence.numbers
            shown.begin(convergence.said)
        if convergence.converged:
            convergence.take_average()
            if self.valid is not None:
                numbers |= self._validate_trained(self.valid)

    def _save(self) -> None:
        self.guard.after_step(self._where())
        if self.now.done:
            self.now.seconds = time.perf_counter() - self._began
        state = {
            **self.step.state(),
            "optimizer": self.step.optimizer.state_dict(),
            "stopped": self.step.stopped(),
            "random": random_states(devices_of(self.model, self.guide)),
            "now": asdict(self.now),
            "history": self.history,
            "best": self.best,
            "settings": self.identity,
            "made_on": self.made_on,
            "batches": self.batches.state(),
            "convergence": None if self.convergence is None else self.convergence.state(),
        }
        self.checkpoints.save(state)
        if not self._best_is_saved:
            self.checkpoints.save_best(self.best)
            self._best_is_saved = True
        self._saved_at = time.perf_counter()
        self.guard.advice = f"; {self.checkpoints.last} still holds it at {self._where()}"

    def _load(self) -> None:
        # The main process sends it through the CPU: other processes may have other devices.
        state = self.checkpoints.load(self.batches.device if self.processes is None else "cpu")
        if wrong := _not_of_fit(state):
            raise BadInput(
                f"{self.checkpoints.last} is a checkpoint of something else than fit ({wrong}); take another run folder"
            )
        there = state["settings"]
        compared = {*there, *self.identity} - {key for key in NOT_FROM_THE_FIRST if key not in there}
        differing = sorted(key for key in compared if there.get(key) != self.identity.get(key))
        if differing:
            key = differing[0]
            raise BadInput(
                f"{self.folder} holds a run of another configuration: {', '.join(differing)} differ "
                f"({key}: {there.get(key)} there, {self.identity.get(key)} here): "
                "resume with the same settings, or take another run folder"
            )
        for name, value in state["made_on"].items():
            if value != self.made_on[name]:
                warnings.warn(
                    f"{self.folder} was begun with {name} {value} and resumes with {self.made_on[name]}: its numbers "
                    "may differ in their last digits from those of a run that was not interrupted",
                    GumboWarning,
                    stacklevel=2,
                )
        self.batches.load(state.get("batches") or {})
        try:
            self.step.load(state)
            self.step.stop(state.get("stopped", []))  # none in an earlier checkpoint
            self.step.optimizer.load_state_dict(state["optimizer"])
            self.history, self.best, self.now = state["history"], state["best"], _Epoch(**state["now"])
            if self.convergence is not None and state.get("convergence") is not None:
                self.convergence.load(state["convergence"])
            devices = devices_of(self.model, self.guide)
            count = min(len(devices), len(state["random"]) - 1)  # a run may go on where other devices are
            set_random_states(state["random"][: 1 + count], devices[:count])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())
            said = said if len(said) < 300 else f"{said[:300]} …"
            raise BadInput(
                f"{self.folder} holds a run of other programs: what it saved does not fit these ({said})"
            ) from error
        self.guard.advice = f"; {self.checkpoints.last} still holds it at {self._where()}"


def _not_of_fit(state: dict[str, Any]) -> str:
    """What a checkpoint lacks that ``fit`` saves, as a phrase; "" if nothing."""
    kinds = {"settings": dict, "made_on": dict, "optimizer": dict, "random": list, "now": dict, "history": list}
    for name, kind in (kinds | {"best": dict, "module": dict}).items():
        if not isinstance(state.get(name), kind):
            return f"it has no {name}"
    if not {"epoch", "elbo", "module"} <= set(state["best"]) or not set(state["made_on"]) <= {"threads", "device"}:
        return "it does not have the best epoch or its environment"
    now, counts = state["now"], ("number", "done", "seen")
    if {*now, "reported"} != {item.name for item in fields(_Epoch)} or not all(
        isinstance(now[name], int) for name in counts
    ):
        return "it does not have its position"
    history = state["history"]
    if not all(isinstance(numbers, dict) for numbers in history) or len(history) < now["number"] - 1:
        return "its history is not that of its epochs"
    return ""


__all__ = ["FitResult", "Run"]

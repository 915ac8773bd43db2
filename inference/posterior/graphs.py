"""Runs of a model and guide over a batch as captured graphs: the terms of the log-weights, without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from ...errors import PROGRAM_ERRORS, BadInput, first_line
from ..engine.constants import Place, Watch, called_with, unmoved
from ..engine.interventions import Unvalidated
from ..engine.noise import Noise, Tape
from ..engine.rows import Rows
from ..engine.scopes import modules_of, private_seed
from .checks import Checks
from .division import data_in
from .runner import Sweep
from .sites import Block

# Makes a fast function of a function of tensors and examples of them.
Compiler = Callable[[Callable[..., list[Tensor]], list[Tensor]], Callable[..., list[Tensor]]]
PER_DATUM = ("log_prior", "log_likelihood", "log_q")
_CONSTANTS = (int, float, complex, str, type(None))


# What loads the compiler of `evaluate`, at most one; training sets it, which this package may not import.
_providers: list[Callable[[], Compiler]] = []


def provide_compiler(provider: Callable[[], Compiler]) -> None:
    """Set what loads the compiler of ``evaluate(compile=True)``."""
    _providers[:] = [provider]


def provided_compiler() -> Compiler:
    """The compiler of ``evaluate(compile=True)``."""
    if not _providers:
        raise BadInput("evaluate(compile=True) needs gumbo.inference, which provides the compiler: import it")
    return _providers[0]()


class Terms(NamedTuple):
    """The terms of a run, ``(3, count, rows)`` in float64 in the order of ``PER_DATUM``, and whether it is valid."""

    parts: Tensor
    valid: Tensor


def terms_of(sweep: Sweep, name: str, arguments: tuple[tuple, dict], count: int, rows: int, checks: Checks) -> Terms:
    """The terms of one run of ``count`` draws, whose latents are all in the data plate ``name``."""
    guide, model = sweep.run(count, Block(), arguments=arguments)
    parts: dict[str, Any] = dict.fromkeys(PER_DATUM)
    valid = []
    for program, run in (("guide", guide), ("model", model)):
        for site, layout in run.layouts.items():
            if layout.kind == "deterministic":
                continue
            value = run.log_prob(site, (name,), scaled=True)
            part = "log_q" if run is guide else "log_prior" if layout.in_prior else "log_likelihood"
            parts[part] = value if parts[part] is None else parts[part] + value
            drawn = guide.seen[site].site if run is model and site in guide.seen else None
            valid += checks.tensors(program, run.seen[site].site, drawn)
    zero = torch.zeros((), dtype=torch.float64, device=sweep.device)
    found = torch.stack([(zero if one is None else one).expand(count, rows) for one in parts.values()])
    return Terms(found, torch.stack([*(one.all() for one in valid), ~found.isnan().any()]).all())


class Graphs:
    """The runs of a `Sweep` as graphs, one for each number of rows and draws.

    Parameters and buffers are inputs. A graph is compared with an eager run on the same noise before its first use, and
    made again after a change of what the programs hold as constants.

    Attributes:
        made: how many graphs were captured.

    Raises:
        BadInput: programs that a graph cannot stand for, in the constructor or in `prepare`.
    """

    def __init__(self, sweep: Sweep, name: str | None, compiler: Compiler):
        if reason := _unfit(sweep, name):
            raise BadInput(f"the evaluation cannot be compiled: {reason}; pass compile=False")
        self.name, self.compiler, self.checks = name, compiler, Checks()
        self.networks = _Networks(modules_of(sweep.model, sweep.guide))
        self.made = 0
        self._watched: Watch | None = None
        self._replaced: set[Place] = set()
        self._graphs: dict[tuple[int, int], tuple[Noise, Callable[..., list[Tensor]]]] = {}

    def prepare(self, sweep: Sweep, batch: Rows, count: int) -> None:
        """Capture the runs of ``count`` draws for batches like this one, if that was not done."""
        if self._watched is not None and self._watched.sees_a_change():
            self._graphs, self._watched = {}, None
        if (count, len(batch)) not in self._graphs:
            # The capture draws: random state, also that of a device, stays as it is.
            with private_seed(None, sweep.model, sweep.guide, *_tensors(batch)):
                self._graphs[count, len(batch)] = self._capture(sweep, batch, count)
        if self._watched is None:
            self._watched = Watch(self.networks, self._replaced)
            self._watched.add_layouts(self.networks.tensors)

    def run(self, batch: Rows, count: int) -> Terms:
        """The terms of a batch with new noise from torch's generators."""
        noise, graph = self._graphs[count, len(batch)]
        noise.draw()
        return Terms(*graph(*self.networks.tensors(), *_tensors(batch), *noise.buffers))

    def _capture(self, sweep: Sweep, batch: Rows, count: int) -> tuple[Noise, Callable[..., list[Tensor]]]:
        self.made += 1
        tape = Tape()
        here, names = self.networks.tensors(), self.networks.names()
        for program, run in zip(
            ("guide", "model"), sweep.run(count, Block(), arguments=(batch.args, batch.kwargs)), strict=True
        ):
            self.checks.learn(program, (one.site for one in run.seen.values()))  # a run that Pyro validates
        self._terms(sweep, batch, count, tape)
        noise = Noise(tape.requests)

        def function(*inputs: Tensor) -> list[Tensor]:
            own, rest = inputs[: len(names)], inputs[len(names) :]
            given, pieces = rest[: len(rest) - len(noise.buffers)], rest[len(rest) - len(noise.buffers) :]
            replaced = dict(zip(names, own, strict=True))
            again = Tape(noise, noise.pieces(pieces))
            return list(self._terms(sweep, _filled(batch, given), count, again, replaced))

        examples = [*here, *_tensors(batch), *noise.buffers]
        try:
            graph = self.compiler(function, [tensor.detach() for tensor in examples])
        except PROGRAM_ERRORS as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"the evaluation cannot be compiled ({first_line(error, kind=True)})") from error
        noise.draw()
        expected = self._terms(sweep, batch, count, Tape(noise))
        found = Terms(*graph(*examples))
        tolerance = 1e-9 if here and here[0].dtype == torch.float64 else 1e-4
        close = torch.isclose(found.parts, expected.parts, rtol=tolerance, atol=tolerance, equal_nan=True)
        # A draw at a threshold may fall on either side.
        if (~close).double().mean() > 0.01 or bool(found.valid) != bool(expected.valid):
            raise BadInput(
                "the evaluation cannot be compiled: on the same noise the captured run differs from the eager one, so"
                " that the programs do something that torch does not see; pass compile=False"
            )
        return noise, graph

    def _terms(
        self, sweep: Sweep, batch: Rows, count: int, tape: Tape, replaced: dict[str, Tensor] | None = None
    ) -> Terms:
        def found() -> Terms:
            rows = data_in(sweep, self.name, batch)
            return terms_of(sweep, self.name, (batch.args, batch.kwargs), count, rows, self.checks)

        with ExitStack() as stack:
            for scope in (pyro.validation_enabled(False), Unvalidated(), unmoved(self.networks, self._replaced), tape):
                stack.enter_context(scope)
            if replaced is None:
                return found()
            # A store of its own: the graph's tensors must not stay behind.
            stack.enter_context(pyro.get_param_store().scope())
            return called_with(self.networks, replaced, found)


class _Networks(nn.Module):
    """The modules of both programs as one, whose call is that of any function."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.programs = nn.ModuleList(modules)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()

    def named(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def names(self) -> list[str]:
        return list(self.named())

    def tensors(self) -> list[Tensor]:
        return list(self.named().values())


def _unfit(sweep: Sweep, name: str | None) -> str:
    """Why the runs of these programs are no function of tensors that a graph could hold; empty if they are."""
    layouts = (*sweep.guide_sites.values(), *sweep.model_sites.values())
    if sweep.mode != "plates":
        return f"draws do not run along a plate ({sweep.reason})"
    if name is None or any(name not in layout.plates for layout in layouts if layout.kind != "deterministic"):
        return "not every site is in the plate over the data"
    if sweep.swept:
        return f"plate {next(iter(sweep.swept))!r} is visited in blocks"
    own = {id(parameter) for module in modules_of(sweep.model, sweep.guide) for parameter in module.parameters()}
    store = pyro.get_param_store()
    strange = [key for key, value in store._params.items() if id(value) not in own]
    return f"{strange[0]!r} is kept in Pyro's param store and not by a module" if strange else ""


def _tensors(batch: Rows) -> list[Tensor]:
    """The tensors of a batch, contiguous: compiled code reads with the strides of its example."""
    odd = [place for place, value in batch.named() if not isinstance(value, (Tensor, *_CONSTANTS))]
    if odd:
        raise BadInput(f"the evaluation cannot be compiled: argument {odd[0]!r} is neither a tensor nor a number")
    return [value.contiguous() for _, value in batch.named() if isinstance(value, Tensor)]


def _filled(batch: Rows, tensors: Sequence[Tensor]) -> Rows:
    """The batch with its tensors replaced, in the order of ``_tensors``."""
    left = iter(tensors)
    args = [next(left) if isinstance(value, Tensor) else value for value in batch.args]
    return Rows.of(args, {key: next(left) if isinstance(v, Tensor) else v for key, v in batch.kwargs.items()})

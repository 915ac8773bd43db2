"""Schedules: functions of the training step for temperatures, KL weights and learning rates."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import BadInput
from ...options import Checked
from ...registry import Registry

Schedule = Callable[[int], float]

schedules: Registry[type] = Registry("schedule")


class _Checked(Checked):
    """Checks that fields are numbers; each schedule checks its own ranges."""

    _ranges = dict.fromkeys(("value", "start", "floor", "end", "rate", "ratio", "steps", "cycles"), -math.inf)


def _require(schedule: object, condition: bool, expected: str) -> None:
    if not condition:
        raise BadInput(f"{schedule!r}: expected {expected}")


@dataclass(frozen=True)
class _Between(_Checked):
    """From ``start`` at step 0 to ``end`` from step ``steps`` on."""

    steps: int
    start: float
    end: float

    def __post_init__(self):
        _require(self, self.steps >= 1, "at least one step")
        _require(self, self.start >= 0 and self.end >= 0, "start and end of at least 0")


@schedules.register("constant")
@dataclass(frozen=True)
class Constant(_Checked):
    """The same number at every step.

    Args:
        value: the number, at least 0.

    >>> Constant(0.5)(10_000)
    0.5
    """

    value: float

    def __post_init__(self):
        _require(self, self.value >= 0, "a number of at least 0")

    def __call__(self, step: int) -> float:
        return float(self.value)


@schedules.register("exponential")
@dataclass(frozen=True)
class Exponential(_Checked):
    r"""Annealing: :math:`\max(\text{floor}, \text{start} \cdot e^{-\text{rate} \cdot t})` at step t.

    The usual schedule of a Gumbel-softmax temperature (Jang, Gu & Poole 2017, arXiv:1611.01144).

    Args:
        start: the value at step 0.
        floor: the lower limit, above 0 and at most ``start``.
        rate: the rate r per step, at least 0.

    Raises:
        BadInput: numbers out of these ranges.

    >>> cooling = Exponential(1.0, 0.5, 1e-4)
    >>> [round(cooling(step), 3) for step in (0, 1_000, 5_000, 50_000)]
    [1.0, 0.905, 0.607, 0.5]
    """

    start: float
    floor: float
    rate: float

    def __post_init__(self):
        _require(self, self.start >= self.floor > 0, "start ≥ floor > 0")
        _require(self, self.rate >= 0, "a rate of at least 0")

    def __call__(self, step: int) -> float:
        return max(float(self.floor), self.start * math.exp(-self.rate * step))


@schedules.register("linear")
@dataclass(frozen=True)
class Linear(_Between):
    """From ``start`` to ``end`` in ``steps`` steps, then ``end``: KL warm-up, from 0 to 1 by default.

    Bowman et al. 2016, arXiv:1511.06349; Sønderby et al. 2016, arXiv:1602.02282.

    Args:
        steps: the number of steps, at least 1.
        start, end: the values at step 0 and from step ``steps`` on, at least 0.

    Raises:
        BadInput: numbers out of these ranges.

    >>> [Linear(1000)(step) for step in (0, 250, 1000, 5000)]
    [0.0, 0.25, 1.0, 1.0]
    """

    start: float = 0.0
    end: float = 1.0

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps)
        return self.start + (self.end - self.start) * done


@schedules.register("cyclical")
@dataclass(frozen=True)
class Cyclical(_Checked):
    """Repeated KL warm-up: ``steps`` are split into ``cycles``; in each the weight rises from 0 and then stays at 1.

    Fu et al. 2019, arXiv:1903.10145.

    Args:
        steps: the number of steps of all cycles, at least one per cycle.
        cycles: the number of cycles, at least 1.
        ratio: the part of a cycle in which the weight rises, in (0, 1].
        end: the value that it rises to and keeps after the last cycle, at least 0.

    Raises:
        BadInput: numbers out of these ranges.

    >>> [Cyclical(100, cycles=2)(step) for step in (0, 10, 25, 49, 50, 60, 99, 100)]
    [0.0, 0.4, 1.0, 1.0, 0.0, 0.4, 1.0, 1.0]
    """

    steps: int
    cycles: int = 4
    ratio: float = 0.5
    end: float = 1.0

    def __post_init__(self):
        _require(self, 1 <= self.cycles <= self.steps, "at least one cycle, of at least one step")
        _require(self, 0 < self.ratio <= 1, "a ratio in (0, 1]")
        _require(self, self.end >= 0, "an end of at least 0")

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return float(self.end)
        place = step * self.cycles % self.steps / self.steps
        return self.end * min(1.0, place / self.ratio)


@schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(_Between):
    """From ``start`` to ``end`` along half a cosine in ``steps`` steps, then ``end``.

    A common learning-rate schedule: ``fit(…, lr=Cosine(10_000, 1e-3, 1e-5))``; ``start`` is the rate itself, not a
    factor of another one. Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.

    Args:
        steps: the number of steps, at least 1.
        start, end: the values at step 0 and from step ``steps`` on, at least 0.

    Raises:
        BadInput: numbers out of these ranges.

    >>> [round(Cosine(100, 1.0, 0.2)(step), 3) for step in (0, 25, 50, 100, 500)]
    [1.0, 0.883, 0.6, 0.2, 0.2]
    """

    start: float = 1.0
    end: float = 0.0

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


@schedules.register("step")
@dataclass(frozen=True)
class Step(_Between):
    """Two stages: ``start`` before step ``steps``, ``end`` from then on.

    Args:
        steps: the number of steps of the first stage, at least 1.
        start, end: the values of the stages, at least 0.

    Raises:
        BadInput: numbers out of these ranges.

    >>> [Step(1000, 0.1, 1e-6)(step) for step in (0, 999, 1000, 5000)]
    [0.1, 0.1, 1e-06, 1e-06]
    """

    start: float = 0.0
    end: float = 1.0

    def __call__(self, step: int) -> float:
        return float(self.start if step < self.steps else self.end)


def end_of(schedule: object, horizon: int) -> int:
    """The step from which a schedule is constant (0 for a number); a user's function is tried up to the ``horizon``.

    >>> end_of(Linear(100), 1000), end_of(0.5, 1000), end_of(Exponential(1.0, 0.5, 0.1), 1000)
    (100, 0, 7)
    >>> end_of(lambda step: min(step, 30), 1000)
    30
    """
    if not callable(schedule) or isinstance(schedule, Constant):
        return 0
    if isinstance(schedule, _Between | Cyclical):
        return int(schedule.steps)
    if isinstance(schedule, Exponential):
        moves = schedule.rate > 0 and schedule.start > schedule.floor
        return math.ceil(math.log(schedule.start / schedule.floor) / schedule.rate) if moves else 0
    step = min(horizon, 1_000_000)
    last = float(schedule(step))
    while step > 0 and float(schedule(step - 1)) == last:
        step -= 1
    return step


def parse_schedule(text: str | float | Schedule) -> Schedule:
    """The schedule that a short string describes, as on the command line; a bare number is constant.

    ``parse_schedule(repr(schedule)) == schedule``.

    Args:
        text: a schedule as text, a number, or a schedule.

    Returns:
        A function of the training step; an argument that is a schedule is returned unchanged.

    Raises:
        UnknownName: an unknown schedule name.
        BadInput: arguments that the schedule does not take.

    >>> parse_schedule("exponential(1.0, 0.5, 1e-4)")
    Exponential(start=1.0, floor=0.5, rate=0.0001)
    >>> parse_schedule("linear(1000)")(500), parse_schedule("0.5")
    (0.5, Constant(value=0.5))
    """
    if callable(text):
        return text
    make, bound = _call(text)
    try:
        return make(*bound.args, **bound.kwargs)
    except BadInput as error:  # it names the schedule with its defaults, which the user did not write
        said = f"{text:g}" if isinstance(text, float) else text
        raise BadInput(f"{said}: {str(error).partition(': ')[2]}") from None


def parse_rate(text: str | float | Schedule) -> Schedule:
    """The schedule of a learning rate that a short string describes; its rates are part of the string.

    Schedules go from or to 1 by default, for weights: as a learning rate that is a mistake nearly always.

    >>> parse_rate("cosine(100, 1e-3)")(0)
    0.001
    >>> parse_rate("cosine(100)")
    Traceback (most recent call last):
    gumbo.errors.BadInput: cosine(100) does not say its start, a rate of 1.0 by default: write it, as in start=0.001
    """
    if not callable(text):
        make, bound = _call(text)
        for name, parameter in inspect.signature(make).parameters.items():
            if name in ("start", "end") and name not in bound.arguments and parameter.default:
                raise BadInput(
                    f"{text} does not say its {name}, a rate of {parameter.default} by default: write it, as in "
                    f"{name}=0.001"
                )
    return parse_schedule(text)


def _call(text: str | float) -> tuple[type, inspect.BoundArguments]:
    """The class of the schedule that a text describes, and its arguments."""
    advice = "a number or a schedule such as 'linear(1000)'"
    try:
        found = ast.parse(str(text).strip(), mode="eval").body
        if not (isinstance(found, ast.Call) and isinstance(found.func, ast.Name)):
            found = ast.Call(ast.Name("constant"), [found], [])
        given = [_number(argument) for argument in found.args]
        named = {str(keyword.arg): _number(keyword.value) for keyword in found.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadInput(f"cannot read the schedule {text!r}: expected {advice}") from None
    make = schedules[found.func.id.lower()]
    signature = inspect.signature(make)
    try:
        return make, signature.bind(*given, **named)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        raise BadInput(f"schedule {text!r}: {error}; it takes {found.func.id.lower()}({takes})") from None


def _number(node: ast.expr) -> float:
    value = ast.literal_eval(node)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return value


__all__ = [
    "Constant",
    "Cosine",
    "Cyclical",
    "Exponential",
    "Linear",
    "Schedule",
    "Step",
    "end_of",
    "parse_rate",
    "parse_schedule",
    "schedules",
]

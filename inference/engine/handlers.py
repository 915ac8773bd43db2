"""Pyro messengers of a run: they record it, draw sites by their estimators, and replay the draws in the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol

import torch
from pyro.distributions.distribution import Distribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...errors import ANY, BadInput, UnsupportedSite
from ..estimators._base import Draw, Estimator
from ..estimators._distributions import is_deterministic
from ..estimators.enumeration import LIMIT
from .contraction import Memory
from .elimination import Listing, NeedsListing, Terms, is_marked, too_large
from .records import PARTICLES

MAX_CHOICES = 64  # the most enumerated sites of one run, if values run one by one

StandIn = Callable[[Any, Estimator, bool], Estimator]
Aside = Callable[[], AbstractContextManager[None]]  # sample statements draw inside it


class Bound(Protocol):
    """The interface of the program that the handlers need; :class:`~gumbo.inference.engine.programs.Program` has it."""

    resolve: Callable[[Any], Estimator | None]
    max_plate_nesting: int | None
    vectorized: bool
    joint: set[str]
    enum_dims: dict[str, int]
    step: int
    num_particles: int
    memory_limit: float
    largest: int
    redraws_misfits: bool


class OfSamples(Messenger):
    """A messenger of sample statements alone.

    It is faster than Pyro's own, which looks for a method by the statement's type at each statement.
    """

    def _process_message(self, msg) -> None:
        if msg["type"] == "sample":
            self._pyro_sample(msg)

    def _postprocess_message(self, msg) -> None:
        if msg["type"] == "sample":
            self._pyro_post_sample(msg)

    def _pyro_sample(self, msg) -> None:
        """Before the statement draws."""

    def _pyro_post_sample(self, msg) -> None:
        """After it has a value."""


class StaysFrozen(Messenger):
    """Keeps frozen parameters of a PyroModule frozen: Pyro's param store sets requires_grad on registration."""

    def __init__(self):
        super().__init__()
        self._frozen: set[str] = set()

    def _pyro_param(self, msg) -> None:
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(given, torch.nn.Parameter) and not given.requires_grad:
            self._frozen.add(msg["name"])

    def _pyro_post_param(self, msg) -> None:
        value = msg["value"]
        if msg["name"] in self._frozen and isinstance(value, Tensor) and value.is_leaf:
            value.requires_grad_(False)


def check_law(name: str, fn: Any) -> None:
    """Refuse a site whose distribution is not one of Pyro, or has no shapes."""
    if isinstance(fn, torch.distributions.Distribution) and not isinstance(fn, Distribution):
        kind = type(fn).__name__
        raise BadInput(
            f"site {name!r}: torch.distributions.{kind} is no Pyro distribution; take {kind} from pyro.distributions"
        )
    if not (hasattr(fn, "batch_shape") and hasattr(fn, "event_shape")):
        raise BadInput(
            f"site {name!r}: {type(fn).__name__} has no batch_shape and event_shape, by which plates and draws are told"
            " apart; derive it from pyro.distributions.TorchDistribution, with log_prob of shape batch_shape"
        )


def is_untraced(msg: Mapping[str, Any]) -> bool:
    """Whether a draw is the program's own noise, of which Pyro's traces hold no site (``ConjugateReparam``)."""
    return bool(msg["infer"].get("_do_not_trace"))


class Recorder(StaysFrozen):
    """Records the sample statements of one program in their order.

    Dimensions to the left of the rightmost ``room`` hold values that are summed out. Their bytes are counted in
    ``memory``; more than its limit is refused, with the names of the sites ``listed``.
    """

    def __init__(self, room: int = 0, memory: Memory | None = None, listed: Callable[[], Iterable[str]] = tuple):
        super().__init__()
        self.messages: dict[str, Any] = {}
        self.params: dict[str, Tensor] = {}
        self.room, self.memory, self.listed = room, memory, listed

    def _process_message(self, msg) -> None:
        if msg["type"] == "param":
            self._pyro_param(msg)

    def _postprocess_message(self, msg) -> None:
        if msg["type"] == "sample":
            self._pyro_post_sample(msg)
        elif msg["type"] == "param":
            self._pyro_post_param(msg)

    def _pyro_post_sample(self, msg) -> None:
        if is_untraced(msg):
            return
        if msg["name"] in self.messages:
            raise BadInput(f"site {msg['name']!r} is sampled twice in one program; give each sample a name of its own")
        if not site_is_subsample(msg):
            check_law(msg["name"], msg["fn"])
        self.messages[msg["name"]] = msg.copy()
        if self.memory is not None and not site_is_subsample(msg):
            fn, value = msg["fn"], msg["value"]
            if len(fn.batch_shape) > self.room or value.dim() - fn.event_dim > self.room:
                self._count(fn, value)

    def _count(self, fn: Any, value: Tensor) -> None:
        """Count the bytes of a statement's log-probability and of its gradient."""
        of_value = value.shape[: value.dim() - fn.event_dim]
        batch = [max(pair) for pair in zip_longest(reversed(fn.batch_shape), reversed(of_value), fillvalue=1)]
        if math.prod(batch[self.room :]) == 1 or next(iter(self.listed()), None) is None:
            return
        size = (value if value.is_floating_point() else torch.empty(0)).element_size()
        if not self.memory.fits(2 * math.prod(batch) * math.prod(fn.event_shape) * size):
            raise too_large(self.memory, list(self.listed()))

    def _pyro_post_param(self, msg) -> None:
        super()._pyro_post_param(msg)
        self.params[msg["name"]] = msg["value"]


class CheckedRows(Messenger):
    """Refuses plates whose ``subsample=`` is not a list of row indices."""

    def _pyro_post_sample(self, msg) -> None:
        if site_is_subsample(msg):
            row_numbers(msg["name"], msg["value"])


class SharedSubsamples(OfSamples):
    """Uses the same rows of a subsampled plate for all particles."""

    def __init__(self, subsamples: dict[str, Tensor], sizes: dict[str, int], aside: Aside):
        super().__init__()
        self.subsamples, self.sizes, self.aside = subsamples, sizes, aside

    def _pyro_sample(self, msg) -> None:
        if not site_is_subsample(msg) or (msg["done"] and msg["name"] not in self.subsamples):
            return
        if msg["value"] is not None and not msg["done"]:
            row_numbers(msg["name"], msg["value"])  # before an outer handler sets other rows
            return
        if msg["name"] in self.subsamples:
            rows, plate = self.subsamples[msg["name"]], msg["fn"]
            # Without a subsample_size a plate of the same size uses the other program's rows, as in Pyro.
            same = plate.subsample_size is None and plate.size == self.sizes.get(msg["name"])
            expected = plate.size if plate.subsample_size is None else plate.subsample_size
            if expected is not None and expected >= 0 and len(rows) != expected and not same:
                if msg["name"] not in self.sizes:
                    raise BadInput(
                        f"plate {msg['name']!r} has {len(rows)} rows in one run of the program and {expected} in"
                        " another, so that its size depends on a draw: take num_particles=1 with estimators of one run,"
                        " such as 'score', 'nvil' or 'pathwise', or give it the largest size and mask the rest"
                    )
                raise BadInput(
                    f"plate {msg['name']!r} has {len(rows)} rows where it is first met and {expected} later; give model"
                    " and guide plates of one size"
                )
            msg["value"] = rows
            msg["done"] = True
        elif msg["fn"].subsample_size not in (None, msg["fn"].size):
            # Drawn later, unless an outer handler sets the rows.
            plate = copy.copy(msg["fn"])
            plate.sample = partial(self._draw, msg["fn"])
            msg["fn"] = plate

    def _draw(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        with self.aside():
            return plate.sample(*args, **kwargs)

    def _pyro_post_sample(self, msg) -> None:
        if site_is_subsample(msg) and msg["name"] != PARTICLES:
            row_numbers(msg["name"], msg["value"])
            self.subsamples.setdefault(msg["name"], msg["value"])
            self.sizes.setdefault(msg["name"], msg["fn"].size)


def _misfits(draw: Draw, fn: Any) -> bool:
    """Whether a draw of another run has another shape than this one's, such as in a plate of a drawn size."""
    shape = fn.shape()
    try:
        return torch.broadcast_shapes(draw.value.shape, shape) != draw.value.shape
    except RuntimeError:
        return True


class Draws(OfSamples):
    """Draws each latent site of the guide by its estimator, or sets it to a given draw."""

    def __init__(
        self,
        program: Bound,
        fixed: Mapping[str, Draw],
        choices: dict[str, int],
        fork: Callable[[dict[str, int], dict[str, Draw]], None] | None,
        stand_in: StandIn | None = None,
        aside: Aside = nullcontext,
        chains: Listing | None = None,
    ):
        super().__init__()
        self.chains = chains  # lays out the values of enumerated sites under pyro.markov, and sees each statement
        self.program, self.fixed, self.fork, self.stand_in = program, fixed, fork, stand_in
        self.aside = aside
        self.choices = choices
        self.draws: dict[str, Draw] = {}
        self.roles: dict[str, tuple[Estimator | None, int | None, bool]] = {}  # estimator, enum_dim, joint
        self.listed: dict[str, tuple[int, frozenset[str]]] = {}  # by enumerated site: number of values, plates
        self.limit = 0  # the largest number of joint values that one of their estimators allows

    def _pyro_sample(self, msg) -> None:
        if is_untraced(msg):
            return
        if self.chains is not None:
            self.chains.enter(msg)
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if is_deterministic(fn):
            if name in self.fixed:
                self._take(msg, self.fixed[name])
            self.roles[name] = (None, None, False)
            return
        estimator = self.program.resolve(msg)
        if self.stand_in is not None and estimator is not None:
            estimator = self.stand_in(msg, estimator, name in self.fixed)
        enum_dim, joint = None, False
        if self.chains is not None and in_chain(msg, estimator):
            self.chains.lay_out(msg)
            draw, joint = Draw(msg["value"]), name in self.program.joint
        elif name in self.fixed and not (self.program.redraws_misfits and _misfits(self.fixed[name], fn)):
            draw = self.fixed[name]
        elif estimator is not None and estimator.enumerates:
            draw, enum_dim, joint = self._enumerate(msg, estimator)
        else:
            with self.aside():
                if estimator is None:
                    check_law(name, fn)
                    draw = Draw(fn(*msg["args"], **msg["kwargs"]))
                else:
                    draw = estimator.draw(fn, self.program.step, msg["args"], msg["kwargs"])
        self.roles[name] = (estimator, enum_dim, joint)
        self._take(msg, draw)

    def _pyro_post_sample(self, msg) -> None:
        if is_untraced(msg):
            return
        if msg["name"] in self.roles and msg["name"] not in self.draws:
            self.draws[msg["name"]] = Draw(msg["value"])
        if self.chains is not None:
            self.chains.leave(msg)

    def _take(self, msg, draw: Draw) -> None:
        self.draws[msg["name"]] = draw
        msg["value"] = draw.value
        msg["done"] = True

    def _enumerate(self, msg: Any, estimator: Estimator) -> tuple[Draw, int | None, bool]:
        program, name, fn = self.program, msg["name"], msg["fn"]
        parallel = program.vectorized
        joint = not parallel or name in program.joint
        # One by one, dependence of a plate's elements cannot be tested, so they are enumerated jointly.
        trailing = min(program.max_plate_nesting, len(fn.batch_shape)) if joint else 0
        values = estimator.listed(fn, trailing, name)
        if isinstance(values, str):
            advice = (
                "; a program that accepts leading dimensions, under vectorize_particles=True, lists the elements of a"
                " plate side by side: let its layers accept them, or take 'local-expectation' or 'rloo'"
            )
            raise UnsupportedSite(name, estimator.name, values if parallel else values + advice)
        self._count(msg, len(values), estimator.limit)
        if not parallel:
            if name not in self.choices:
                upstream = {**self.fixed, **self.draws}
                for index in range(1, len(values)):
                    self.fork({**self.choices, name: index}, upstream)
                self.choices[name] = 0
            return Draw(values[self.choices[name]]), None, True
        enum_dim = program.enum_dims.setdefault(name, -(2 + program.max_plate_nesting + len(program.enum_dims)))
        if self.chains is not None and enum_dim <= self.chains.first + 1:
            raise NeedsListing(name)
        # Dimensions further left are alternatives of an upstream site: they take the same values.
        excess = max(0, len(fn.batch_shape) + 1 + enum_dim)
        values = values[(slice(None),) + (0,) * excess]
        ones = (1,) * (-enum_dim - 1 - len(fn.batch_shape) + excess)
        return Draw(values.reshape(values.shape[:1] + ones + values.shape[1:])), enum_dim, joint

    def _count(self, msg: Any, count: int, limit: int) -> None:
        """Refuse a program whose enumerated sites have too many joint values, before these are laid out."""
        plates = frozenset(f.name for f in msg["cond_indep_stack"] if f.vectorized and f.name != PARTICLES)
        self.listed[msg["name"]] = (count, plates)
        self.limit = max(self.limit, limit)
        if self.program.vectorized:
            # Values of sites in separate plates are summed separately.
            counts = {n: c for n, (c, other) in self.listed.items() if other <= plates or plates <= other}
            total = math.prod(counts.values())
            if total <= self.limit:
                return
            if self.limit != LIMIT:
                raise too_many(counts, total, self.limit)
            # A later statement may depend on all of them.
            memory = Memory(self.program.memory_limit)
            if not memory.fits(2 * total * self.program.num_particles * self.program.largest):
                raise too_large(memory, list(counts))
        elif len(self.choices) > MAX_CHOICES:
            raise UnsupportedSite(
                msg["name"],
                "enumerate",
                f"it is the {len(self.choices)}th enumerated site of one run, as in a loop that a draw ends (a"
                " geometric variable): an unbounded loop cannot be enumerated; bound it, or take 'score' or 'rloo'",
            )


def in_chain(msg: Mapping[str, Any], estimator: Estimator | None) -> bool:
    """Whether a site of the guide is enumerated under ``pyro.markov``, where elimination replaces joint enumeration."""
    return estimator is not None and estimator.enumerates and "_markov_scope" in msg["infer"]


class Replay(OfSamples):
    """Replays the guide's draws in the model, with the log-probability of each draw that its estimator needs.

    Sites that the model sums out are drawn from it, or take the given ``values``, unless they are enumerated: at the
    first of them ``make_terms`` makes the ``terms`` of their sums. Most models have none.
    """

    def __init__(
        self,
        draws: Draws,
        values: Mapping[str, Tensor] | None = None,
        make_terms: Callable[[], Terms | None] = lambda: None,
    ):
        super().__init__()
        self.draws, self.values, self.make_terms = draws, values or {}, make_terms
        self.terms: Terms | None = None
        self.eliminated: list[str] = []
        self._earlier: list[Any] = []  # the statements before the first enumerated one

    def _pyro_post_sample(self, msg) -> None:
        if self.terms is not None and self.terms.listing.by_number and not is_untraced(msg):
            self.terms.listing.leave(msg)

    def _pyro_sample(self, msg) -> None:
        if site_is_subsample(msg) or is_untraced(msg):
            return
        name = msg["name"]
        if self.terms is None:
            if not (msg["done"] or name in self.draws.draws) and is_marked(msg):
                self.terms = self.make_terms()
                if self.terms is not None:
                    for earlier in self._earlier:
                        self.terms.listing.enter(earlier)
            else:
                self._earlier.append(msg)
        if self.terms is not None:
            self.terms.listing.enter(msg)
        # The guide's draw replaces the value that an inner handler (poutine.replay) set, as in Pyro.
        if msg["is_observed"] or (msg["done"] and name not in self.draws.draws):
            return
        if name not in self.draws.draws:
            if not is_marked(msg):
                self._refuse(msg)
            self.eliminated.append(name)
            if name in self.values:
                msg["value"] = self.values[name]
            else:
                with self.draws.aside(), torch.no_grad():
                    msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["done"] = True
            return
        draw = self.draws.draws[name]
        estimator = self.draws.roles[name][0]
        if estimator is not None:
            msg["fn"] = estimator.model_fn(msg["fn"], draw, self.draws.program.step)
        msg["value"] = draw.value
        msg["done"] = True

    def _refuse(self, msg) -> None:
        name = msg["name"]
        reason = "it is latent in the model and has no site in the guide; sample it there too, or observe it"
        if getattr(msg["fn"], "has_enumerate_support", False):
            mark = "mark it infer={'enumerate': 'parallel'} in the model"
            if name.endswith("_unobserved"):  # pyro.sample passes no infer= on to the two sites of obs_mask=
                mark = "mark it by pyro.infer.config_enumerate(model), since obs_mask= drops infer="
            reason += f", or {mark}, which sums over it"
        raise UnsupportedSite(name, ANY, reason)


def row_numbers(plate: str, subsample: Any) -> Tensor:
    """The rows that a plate received by ``subsample=``, or drew; refuses anything but a list of indices.

    >>> row_numbers("data", [2, 0])
    tensor([2, 0])
    """
    if type(subsample) is Tensor and subsample.dtype == torch.int64 and subsample.dim() == 1:
        return subsample
    try:
        rows = torch.as_tensor(subsample)
    except (TypeError, ValueError, RuntimeError):  # values that no tensor can hold
        raise BadInput(
            f"plate {plate!r}: subsample= is {type(subsample).__name__}, expected row numbers (B,)"
        ) from None
    if rows.dim() != 1:
        raise BadInput(
            f"plate {plate!r}: subsample= has shape {tuple(rows.shape)}, expected row numbers (B,); for a batch x whose"
            " row numbers are not known, pass subsample_size=len(x)"
        )
    if rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
        raise BadInput(f"plate {plate!r}: subsample= holds {rows.dtype}, expected row numbers (B,), integers")
    return rows


def too_many(counts: Mapping[str, int], total: int, limit: int) -> UnsupportedSite:
    names = ", ".join([repr(name) for name in list(counts)[:6]] + ["…"] * (len(counts) > 6))
    return UnsupportedSite(
        next(iter(counts)),
        "enumerate",
        f"the {len(counts)} enumerated sites ({names}) have {total} combinations of values together, more than the"
        f" limit of {limit}; enumerate fewer of them, or raise Enumerate(limit=…)",
    )


def nesting(recorder: Recorder) -> int:
    """The depth of nested plates in one program."""
    dims = [
        -frame.dim
        for msg in recorder.messages.values()
        for frame in msg["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLES
    ]
    return max(dims, default=0)

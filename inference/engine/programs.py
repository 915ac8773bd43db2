"""Running a model and a guide under estimators: draws, replays, particles, enumerated values, and what was recorded.

The batch dimensions of every recorded log-probability are laid out as ``(…enumerated, K, *plates)``: the rightmost
``max_plate_nesting`` dimensions belong to plates, the next to the K particles, and every enumerated site has one of its
own to the left of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from ...errors import ANY, BadInput, CallsAutograd, CannotVectorize, GumboError, UnsupportedSite
from ..estimators._base import Draw, Estimator
from ..estimators._distributions import (
    describe,
    elementary,
    finite_support,
    has_own_mask,
    has_score_term,
    has_transforms,
    is_deterministic,
    is_discrete,
    score_log_prob,
    score_term,
)
from .streams import Generators, OwnNoise

PARTICLES = "_gumbo_particles"

Frame = tuple[str, int, int]
Frames = frozenset[Frame]
StandIn = Callable[[Any, Estimator, bool], Estimator]
Aside = Callable[[], AbstractContextManager[None]]  # a sample statement draws within it


@dataclass
class Site:
    """One recorded sample statement, its log-probability laid out as above."""

    name: str
    fn: Any
    value: Tensor
    frames: Frames
    log_prob: Tensor
    scale: Any = 1.0
    latent: bool = False
    settled: bool = False  # a Delta or a pyro.deterministic: it can carry a dependence, but draws nothing
    estimator: Estimator | None = None
    draw: Draw | None = None
    score: Tensor | None = None
    enum_dim: int | None = None
    joint: bool = False
    factor: bool = False  # a pyro.factor of the guide that stands for draws without a path, made somewhere before it
    infer: Mapping[str, Any] = field(default_factory=dict)
    scored: bool = True  # False where a replayed draw cannot be scored, and only the other sites can be compared

    @property
    def drawn(self) -> bool:
        return self.estimator is not None and not self.estimator.enumerates


@dataclass
class Run:
    """One execution of guide and model: K particles at once, or one particle, or one path through enumerated values."""

    guide: list[Site]
    model: list[Site]
    choices: dict[str, int] = field(default_factory=dict)
    subsamples: dict[str, Tensor] = field(default_factory=dict)
    guide_params: dict[str, Tensor] = field(default_factory=dict)
    model_params: dict[str, Tensor] = field(default_factory=dict)
    partial_plates: Frames = frozenset()
    listed: dict[str, int] = field(default_factory=dict)  # how many values each enumerated site has
    limit: int = 0
    partial_loops: frozenset[str] = frozenset()  # sequential plates of which only some elements were visited
    noise: OwnNoise | None = None  # what the programs drew outside of sample statements; None: not kept apart

    @property
    def sites(self) -> list[Site]:
        return self.guide + self.model

    def guide_site(self, name: str) -> Site:
        return next(site for site in self.guide if site.name == name)


class Misfit(BadInput):
    """A plate or a parameter that does not fit where it stands, as Pyro's own statement finds."""


class _Recorder(Messenger):
    """Keeps the sample statements of one program in the order they ran."""

    def __init__(self):
        super().__init__()
        self.messages: dict[str, Any] = {}
        self.params: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg) -> None:
        if msg["infer"].get("_do_not_trace"):
            return
        if msg["name"] in self.messages:
            raise BadInput(f"site {msg['name']!r} is sampled twice in one program; give each sample a name of its own")
        self.messages[msg["name"]] = msg.copy()

    def _pyro_post_param(self, msg) -> None:
        self.params[msg["name"]] = msg["value"]


class _SharedSubsamples(Messenger):
    """Lets all particles see the same rows of a subsampled plate."""

    def __init__(self, subsamples: dict[str, Tensor], sizes: dict[str, int], aside: Aside):
        super().__init__()
        self.subsamples, self.sizes, self.aside = subsamples, sizes, aside

    def _pyro_sample(self, msg) -> None:
        if not site_is_subsample(msg) or msg["done"] or msg["value"] is not None:
            return
        if msg["name"] in self.subsamples:
            rows, plate = self.subsamples[msg["name"]], msg["fn"]
            # Without a subsample_size a plate of the same size takes the rows that the other program chose, as in Pyro.
            same = plate.subsample_size is None and plate.size == self.sizes.get(msg["name"])
            expected = plate.size if plate.subsample_size is None else plate.subsample_size
            if expected is not None and expected >= 0 and len(rows) != expected and not same:
                raise BadInput(
                    f"plate {msg['name']!r} has {len(rows)} rows where it is first met and {expected} later; give model"
                    " and guide plates of one size"
                )
            msg["value"] = rows
        else:
            whole = msg["fn"].subsample_size in (None, msg["fn"].size)  # nothing is drawn
            with nullcontext() if whole else self.aside():
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["done"] = True

    def _pyro_post_sample(self, msg) -> None:
        if site_is_subsample(msg) and msg["name"] != PARTICLES:
            self.subsamples.setdefault(msg["name"], msg["value"])
            self.sizes.setdefault(msg["name"], msg["fn"].size)


class _Draws(Messenger):
    """Lets each latent site of the guide draw as its estimator says, or take a given draw."""

    def __init__(
        self,
        program: Program,
        fixed: Mapping[str, Draw],
        choices: dict[str, int],
        fork: Callable[[dict[str, int], dict[str, Draw]], None] | None,
        stand_in: StandIn | None = None,
        aside: Aside = nullcontext,
    ):
        super().__init__()
        self.program, self.fixed, self.fork, self.stand_in = program, fixed, fork, stand_in
        self.aside = aside
        self.choices = choices
        self.draws: dict[str, Draw] = {}
        self.roles: dict[str, tuple[Estimator | None, int | None, bool]] = {}
        self.listed: dict[str, tuple[int, frozenset[str]]] = {}  # for each enumerated site its values and plates
        self.limit = 0  # the largest of the limits that these have

    def _pyro_sample(self, msg) -> None:
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
        if name in self.fixed:
            draw = self.fixed[name]
        elif estimator is not None and estimator.enumerates:
            draw, enum_dim, joint = self._enumerate(msg, estimator)
        else:
            with self.aside():
                if estimator is None:
                    draw = Draw(fn(*msg["args"], **msg["kwargs"]))
                else:
                    draw = estimator.draw(fn, self.program.step, msg["args"], msg["kwargs"])
        self.roles[name] = (estimator, enum_dim, joint)
        self._take(msg, draw)

    def _pyro_post_sample(self, msg) -> None:
        if msg["name"] in self.roles and msg["name"] not in self.draws:
            self.draws[msg["name"]] = Draw(msg["value"])

    def _take(self, msg, draw: Draw) -> None:
        self.draws[msg["name"]] = draw
        msg["value"] = draw.value
        msg["done"] = True

    def _enumerate(self, msg: Any, estimator: Estimator) -> tuple[Draw, int | None, bool]:
        program, name, fn = self.program, msg["name"], msg["fn"]
        parallel = program.vectorized
        joint = not parallel or name in program.joint
        # One by one, nothing tells whether a program keeps the elements of a plate apart, so they go together.
        trailing = min(program.max_plate_nesting, len(fn.batch_shape)) if joint else 0
        values = finite_support(fn, joint=trailing, limit=estimator.limit)
        if isinstance(values, str):
            advice = "; vectorize_particles=True with num_particles=1 enumerates the elements of a plate in parallel"
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
        # Dimensions further left belong to alternatives of a site upstream: they take the same values.
        excess = max(0, len(fn.batch_shape) + 1 + enum_dim)
        values = values[(slice(None),) + (0,) * excess]
        ones = (1,) * (-enum_dim - 1 - len(fn.batch_shape) + excess)
        return Draw(values.reshape(values.shape[:1] + ones + values.shape[1:])), enum_dim, joint

    def _count(self, msg: Any, count: int, limit: int) -> None:
        """Refuse a program whose enumerated sites have too many values together, before these are laid out."""
        plates = frozenset(f.name for f in msg["cond_indep_stack"] if f.vectorized and f.name != PARTICLES)
        self.listed[msg["name"]] = (count, plates)
        self.limit = max(self.limit, limit)
        if self.program.vectorized:
            # Values of sites in plates that lie apart are summed over apart.
            counts = {n: c for n, (c, other) in self.listed.items() if other <= plates or plates <= other}
            if math.prod(counts.values()) > self.limit:
                raise too_many(counts, math.prod(counts.values()), self.limit)
        elif len(self.choices) > MAX_CHOICES:
            raise UnsupportedSite(
                msg["name"],
                "enumerate",
                f"it is the {len(self.choices)}th enumerated site of one run, as in a loop that a draw ends (a"
                " geometric variable): what has no end cannot be listed; bound the loop, or take 'score' or 'rloo'",
            )


MAX_CHOICES = 64  # enumerated sites of one run, where these are run value by value
ENOUGH_PATHS = 64  # after so many, their number is foreseen from the share of all values that they cover


def too_many(counts: Mapping[str, int], total: int, limit: int) -> UnsupportedSite:
    names = ", ".join([repr(name) for name in list(counts)[:6]] + ["…"] * (len(counts) > 6))
    return UnsupportedSite(
        next(iter(counts)),
        "enumerate",
        f"the {len(counts)} enumerated sites ({names}) have {total} combinations of values together, more than the"
        f" limit of {limit}; enumerate fewer of them, or raise Enumerate(limit=…)",
    )


class _Replay(Messenger):
    """Gives the model the guide's draws, and each relaxed draw the log-probability its estimator wants."""

    def __init__(self, draws: _Draws):
        super().__init__()
        self.draws = draws

    def _pyro_sample(self, msg) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        name = msg["name"]
        if name not in self.draws.draws:
            self._refuse(msg)
        draw = self.draws.draws[name]
        estimator = self.draws.roles[name][0]
        if estimator is not None:
            msg["fn"] = estimator.model_fn(msg["fn"], draw, self.draws.program.step)
        msg["value"] = draw.value
        msg["done"] = True

    def _refuse(self, msg) -> None:
        name = msg["name"]
        if msg["infer"].get("enumerate"):
            reason = "it is enumerated in the model, which only the stock 'trace-enum' does"
        else:
            reason = "it is latent in the model and has no site in the guide; sample it there too, or observe it"
        raise UnsupportedSite(name, ANY, reason)


class Program:
    """A model and a guide, bound to the way they are run.

    With ``max_plate_nesting=None`` the first run, of one particle, finds it. With ``generators`` the programs' own
    noise is kept apart from the sites' draws, so that it can be repeated.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *,
        resolve: Callable[[Any], Estimator | None],
        num_particles: int,
        max_plate_nesting: int | None,
        vectorized: bool,
        joint: set[str] | None = None,
        enum_dims: dict[str, int] | None = None,
        step: int = 0,
        generators: Generators | None = None,
    ):
        self.model, self.guide, self.resolve = model, guide, resolve
        self.num_particles, self.max_plate_nesting = num_particles, max_plate_nesting
        self.vectorized, self.step, self.generators = vectorized, step, generators
        self.joint = set() if joint is None else joint
        self.enum_dims = {} if enum_dims is None else enum_dims
        self.skips_unscored = False

    def runs(self, args: tuple, kwargs: Mapping[str, Any], **options: Any) -> list[list[Run]]:
        """For each group of particles that ran together, its paths through enumerated values."""
        subsamples: dict[str, Tensor] = {}
        if self.vectorized:
            return [[self.run(args, kwargs, subsamples=subsamples, **options)]]
        return [list(self.paths(args, kwargs, subsamples, **options)) for _ in range(self.num_particles)]

    def paths(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        subsamples: dict[str, Tensor],
        fixed: Mapping[str, Draw] | None = None,
        noise: OwnNoise | None = None,
        **options: Any,
    ) -> Iterator[Run]:
        """One particle, once for each combination of enumerated values; what is upstream of a choice is shared."""
        noise = noise or self._noise()
        waiting: list[tuple[dict[str, int], dict[str, Draw]]] = [({}, dict(fixed or {}))]
        done, covered, limit = 0, 0.0, 0
        counts: dict[str, int] = {}
        while waiting:
            choices, fixed = waiting.pop()
            run = self.run(
                args,
                kwargs,
                fixed=fixed,
                choices=dict(choices),
                subsamples=subsamples,
                noise=noise,
                fork=lambda *pending: waiting.append(pending),
                **options,
            )
            yield run
            # A path lists the choices that it met first; those before them are given.
            counts, limit = counts | run.listed, max(limit, run.limit)
            done, covered = done + 1, covered + 1 / math.prod(counts[name] for name in run.choices)
            foreseen = round(done / covered) if done >= ENOUGH_PATHS else done + len(waiting)
            if waiting and foreseen > limit:
                raise too_many(counts, foreseen, limit)

    def run(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        fixed: Mapping[str, Draw] | None = None,
        choices: dict[str, int] | None = None,
        subsamples: dict[str, Tensor] | None = None,
        fork: Callable | None = None,
        with_model: bool = True,
        stand_in: StandIn | None = None,
        around_guide: AbstractContextManager | None = None,
        noise: OwnNoise | None = None,
    ) -> Run:
        """Execute the guide, then the model against it.

        ``stand_in`` may put one estimator in place of another; ``around_guide`` is entered while the guide is run and
        its draws are scored; ``noise`` is that of another run, to be repeated.
        """
        choices = {} if choices is None else choices
        subsamples = {} if subsamples is None else subsamples
        noise = noise or self._noise()
        aside = noise.aside if noise else nullcontext
        draws = _Draws(self, fixed or {}, choices, fork, stand_in, aside)
        sizes: dict[str, int] = {}
        with noise.entered() if noise else nullcontext():
            with around_guide or nullcontext():
                guide = self._record(self.guide, args, kwargs, draws, _SharedSubsamples(subsamples, sizes, aside))
                self._check_nesting(guide)
                guide_sites = self._sites(guide, draws) if self.max_plate_nesting is not None else []
            model = _Recorder()
            if with_model:
                model = self._record(
                    self.model, args, kwargs, _Replay(draws), _SharedSubsamples(subsamples, sizes, aside)
                )
            self._check_nesting(model)
            if self.max_plate_nesting is None:
                self.max_plate_nesting = max(_nesting(guide), _nesting(model))
                guide_sites = self._sites(guide, draws)
            if with_model:
                for name, msg in guide.messages.items():
                    if not msg["is_observed"] and not site_is_subsample(msg):
                        _check_met(name, msg, model.messages.get(name), self.max_plate_nesting)
            model_sites = self._sites(model, None)
        run = Run(guide_sites, model_sites, choices, subsamples, guide.params, model.params, noise=noise)
        run.listed, run.limit = {name: count for name, (count, _) in draws.listed.items()}, draws.limit
        subsampled = [
            f
            for recorder in (guide, model)
            for msg in recorder.messages.values()
            for f in msg["cond_indep_stack"]
            if f.name != PARTICLES and f.full_size not in (None, f.size)
        ]
        run.partial_plates = frozenset((f.name, f.dim, f.size) for f in subsampled if f.vectorized)
        run.partial_loops = frozenset(f.name for f in subsampled if not f.vectorized)
        return run

    def _noise(self) -> OwnNoise | None:
        return None if self.generators is None else OwnNoise(self.generators)

    def _check_nesting(self, recorder: _Recorder) -> None:
        deepest = _nesting(recorder)
        if self.max_plate_nesting is not None and deepest > self.max_plate_nesting:
            raise BadInput(f"max_plate_nesting is {self.max_plate_nesting}, but the plates nest {deepest} deep")

    def _sites(self, recorder: _Recorder, draws: _Draws | None) -> list[Site]:
        return [self._site(msg, draws) for msg in recorder.messages.values() if not site_is_subsample(msg)]

    def _record(self, fn: Callable, args, kwargs, handler: Messenger, subsamples: _SharedSubsamples) -> _Recorder:
        recorder = _Recorder()
        with recorder, subsamples, handler:
            if self.vectorized and self.num_particles > 1:
                with pyro.poutine.block(hide=[PARTICLES]):
                    particles = pyro.plate(PARTICLES, self.num_particles, dim=-1 - self.max_plate_nesting)
                with particles:
                    _call(fn, args, kwargs)
            else:
                _call(fn, args, kwargs)
        return recorder

    def _site(self, msg, draws: _Draws | None) -> Site:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        latent = not msg["is_observed"]
        frames = frozenset(
            (f.name, f.dim, f.size) for f in msg["cond_indep_stack"] if f.vectorized and f.name != PARTICLES
        )
        site = Site(
            name,
            fn,
            value,
            frames,
            value,
            scale=msg["scale"],
            latent=latent,
            settled=is_settled(msg),
            infer=msg["infer"],
        )
        if draws is not None and not latent and isinstance(elementary(fn), pyro.distributions.Unit):
            site.factor = not _has_rsample(msg)
        if draws is not None and latent:
            site.estimator, site.enum_dim, site.joint = draws.roles[name]
            site.draw = draws.draws[name]
            if site.estimator is not None:
                site.fn = site.estimator.guide_fn(fn, site.draw, self.step)
        try:
            unscaled = site.fn.log_prob(value, *msg["args"], **msg["kwargs"])
        except (KeyError, NotImplementedError) as error:
            if not has_transforms(fn):
                raise
            if self.skips_unscored:
                site.scored, site.log_prob = False, value.new_zeros((1,) * (1 + self.max_plate_nesting))
                return site
            raise UnsupportedSite(
                name,
                site.estimator.name if site.estimator is not None else ANY,
                "its transform has no inverse, so that only a reparameterized draw can be scored, and only once",
                [] if site.estimator is not None and site.estimator.name == "pathwise" else ["pathwise"],
            ) from error
        except ValueError as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInput(f"site {name!r}: {describe(fn)} cannot score its value ({first})") from error
        site.log_prob = self._lay_out(name, scale_and_mask(unscaled, msg["scale"], msg["mask"]), frames)
        if site.estimator is not None and (site.estimator.log_q == "value" or site.estimator.enumerates):
            raw = score_log_prob(fn, value) if has_own_mask(fn) or site.fn is not fn else unscaled
            site.score = self._lay_out(name, raw, frames)
        elif site.factor:
            site.score = self._lay_out(name, unscaled, frames)
        elif site.estimator is not None and site.estimator.has_path and name not in draws.fixed and has_score_term(fn):
            raw = score_term(fn, value)
            site.score = None if raw is None else self._lay_out(name, raw, frames)
        return site

    def _lay_out(self, name: str, log_prob: Tensor, frames: Frames) -> Tensor:
        room = 1 + self.max_plate_nesting
        if log_prob.dim() < room:
            log_prob = log_prob.reshape((1,) * (room - log_prob.dim()) + log_prob.shape)
        plates = {dim for _, dim, _ in frames}
        loose = [dim for dim in range(-self.max_plate_nesting, 0) if log_prob.shape[dim] > 1 and dim not in plates]
        if not self.vectorized and log_prob.dim() >= room:
            loose += [dim for dim in range(-log_prob.dim(), -self.max_plate_nesting) if log_prob.shape[dim] > 1]
        if loose:
            raise UnsupportedSite(
                name,
                ANY,
                f"its batch shape {tuple(log_prob.shape)} has dimension {loose[0]} outside any plate;"
                " declare it with pyro.plate or make it part of the event with .to_event",
            )
        return log_prob


def _call(fn: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    try:
        fn(*args, **kwargs)
    except RuntimeError as error:
        if not any(said in str(error) for said in ("does not require grad", "to not have been used in the graph")):
            raise
        first = str(error).splitlines()[0]
        raise CallsAutograd(
            f"the program calls autograd inside, and something there carries no gradient ({first}); draws have one"
            " under 'pathwise' only, parameters under every word but stl, dreg, rebar and muprop"
        ) from error
    except ValueError as error:
        # A plate that does not fit is Pyro's to find; what a program of the user's raises itself stays as it is.
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        module = where.tb_frame.f_globals.get("__name__", "")
        if isinstance(error, GumboError) or not module.startswith(("pyro.poutine", "pyro.primitives")):
            raise
        raise Misfit(str(error).splitlines()[0]) from error


def _check_met(name: str, msg: Any, met: Any, max_plate_nesting: int) -> None:
    """Refuse a latent site of the guide that is not one of the model, of the same shape."""
    if met is None:
        if msg["infer"].get("is_auxiliary"):
            return
        reason = (
            "it is sampled in the guide and nowhere in the model; if that is meant, mark it"
            " infer={'is_auxiliary': True}"
        )
        raise UnsupportedSite(name, ANY, reason)
    if met["is_observed"]:
        reason = (
            "the guide samples it, and the model observes it (obs=, condition or deterministic), so that the guide's"
            " draw is not used and the value is no bound; drop it from the guide, or leave it latent in the model"
        )
        raise UnsupportedSite(name, ANY, reason)
    (batch, event), (model_batch, model_event) = (_shape(each["fn"], max_plate_nesting) for each in (msg, met))
    if (batch, event) != (model_batch, model_event):
        kept = {frame.dim for frame in met["cond_indep_stack"]}
        lacking = [f.name for f in msg["cond_indep_stack"] if f.vectorized and f.size > 1 and f.dim not in kept]
        reason = (
            f"model and guide disagree on its shape: batch {model_batch} and event {model_event} in the model, batch"
            f" {batch} and event {event} in the guide"
        )
        if lacking:
            reason += f", in plate {lacking[0]!r}, which the model's is not in"
        raise UnsupportedSite(name, ANY, reason)


def _shape(fn: Any, max_plate_nesting: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch shape along plates, and event shape; further left stand particles and enumerated values."""
    batch = tuple(fn.batch_shape)[-max_plate_nesting:] if max_plate_nesting else ()
    while batch and batch[0] == 1:
        batch = batch[1:]
    return batch, tuple(fn.event_shape)


def _has_rsample(factor: Any) -> bool:
    """Whether a ``pyro.factor`` of the guide stands for draws that have a path."""
    unit = elementary(factor["fn"])
    if "has_rsample" not in vars(unit):
        raise BadInput(
            f"pyro.factor({factor['name']!r}, …) in the guide must say where its term comes from: has_rsample=True for"
            " reparameterized draws, has_rsample=False for others"
        )
    return bool(unit.has_rsample)


def _nesting(recorder: _Recorder) -> int:
    """How many plates deep the statements of one program stand."""
    return max(
        (
            -frame.dim
            for msg in recorder.messages.values()
            for frame in msg["cond_indep_stack"]
            if frame.vectorized and frame.name != PARTICLES
        ),
        default=0,
    )


def is_settled(msg) -> bool:
    return is_deterministic(msg["fn"]) or bool(msg["infer"].get("_deterministic"))


def observed_in_support(msg) -> Tensor | None:
    """Where observed values are ones that their distribution can have produced; None for what cannot be told."""
    if not msg["is_observed"] or site_is_subsample(msg) or msg["value"] is None:
        return None
    try:
        support = msg["fn"].support
        while isinstance(support, torch.distributions.constraints.independent):
            support = support.base_constraint  # all must hold, so that nothing need be gathered by event
        return torch.as_tensor(support.check(msg["value"]))
    except (NotImplementedError, AttributeError, ValueError):  # Pyro's and torch's ways to have no support
        return None


def check_same_kind(run: Run) -> None:
    """A pmf is never compared with a density."""
    model = {site.name: site for site in run.model}
    for site in run.guide:
        other = model.get(site.name)
        if not site.latent or other is None or site.settled or other.settled:
            continue
        kinds = {is_discrete(site.fn): "a pmf", is_discrete(other.fn): "a density"}
        if len(kinds) == 2:
            guide_is, model_is = ("a pmf", "a density") if is_discrete(site.fn) else ("a density", "a pmf")
            raise UnsupportedSite(
                site.name,
                ANY,
                f"the guide has {guide_is} ({describe(site.fn)}) where the model has {model_is}"
                f" ({describe(other.fn)}), and their ratio means nothing",
            )


def check_vectorized(program: Program, run: Run, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Replay one particle of a vectorized run on its own and compare what each site says of it."""
    alone = Program(
        program.model,
        program.guide,
        resolve=program.resolve,
        num_particles=1,
        max_plate_nesting=program.max_plate_nesting,
        vectorized=False,
        step=program.step,
        generators=program.generators,
    )
    alone.skips_unscored = True
    if (stray := _stray_dimension(program, run)) is not None:
        raise does_not_vectorize(*stray)
    fixed = _last_particle(run, seen, program.max_plate_nesting)
    # Gradients are on, for programs that call autograd inside.
    with torch.enable_grad():
        single = alone.run(args, kwargs, fixed=fixed, subsamples=dict(run.subsamples), noise=run.noise)
    difference = _difference(run, single, program.max_plate_nesting)
    if difference is None:
        return
    if run.noise.drew:  # perhaps in another shape, with which nothing can be compared
        raise NoisyProgram
    raise does_not_vectorize(*difference)


def _stray_dimension(program: Program, run: Run) -> tuple[str, str] | None:
    """The first site with a dimension to the left that belongs neither to particles nor to enumerated values.

    An ``unsqueeze`` moves the particles there, where they would be taken for more of them and summed.
    """
    known = {-1 - program.max_plate_nesting, *program.enum_dims.values()}
    for site in run.sites:
        shape = site.log_prob.shape
        for dim in range(-len(shape), -program.max_plate_nesting):
            if shape[dim] > 1 and dim not in known:
                return site.name, f"its log-probability {tuple(shape)} has dimension {dim} of its own"
    return None


class NoisyProgram(Exception):
    """A program whose layers draw noise of their own (dropout), so that two runs on the same draws differ."""


def _last(tensor: Tensor, event_dim: int, max_plate_nesting: int) -> Tensor:
    """The last particle, and the last of each enumerated value."""
    while tensor.dim() - event_dim > max_plate_nesting:
        tensor = tensor[-1]
    return tensor


def _last_particle(run: Run, seen: Run, max_plate_nesting: int) -> dict[str, Draw]:
    shapes = {site.name: site.value.shape for site in seen.guide}
    fixed = {}
    for site in run.guide:
        if site.latent:
            event_dim = site.fn.event_dim
            draw = site.draw.map(
                lambda t, e=event_dim: _last(t, e, max_plate_nesting).detach().requires_grad_(t.requires_grad)
            )
            shape = shapes.get(site.name, draw.value.shape)
            if draw.value.numel() == shape.numel():
                draw = draw.map(lambda t, s=shape: t.reshape(s))
            fixed[site.name] = draw
    return fixed


def _difference(run: Run, single: Run, max_plate_nesting: int) -> tuple[str, str] | None:
    """The first site that says one thing among K particles and another alone, and how."""
    for many, one in ((run.guide, single.guide), (run.model, single.model)):
        by_name = {site.name: site for site in one}
        for site in many:
            if site.name not in by_name:
                return site.name, "it is missing when a particle runs alone"
            if not (site.scored and by_name[site.name].scored):
                continue
            a = _last(site.log_prob.detach(), 0, max_plate_nesting)
            b = _last(by_name[site.name].log_prob.detach(), 0, max_plate_nesting)
            a, b = torch.broadcast_tensors(a, b)
            size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
            if not torch.allclose(a, b, rtol=0.0, atol=_tolerance(b) * (1 + size), equal_nan=True):
                gap = (a - b).abs().max().item()
                return site.name, f"its log-probability differs by {gap:.3g} between many at once and one alone"
    return None


def _tolerance(like: Tensor) -> float:
    if like.dtype == torch.float64:
        return 1e-9
    return 2e-3 if like.device.type == "cuda" or like.dtype != torch.float32 else 5e-5


def does_not_vectorize(site: str, reason: str) -> CannotVectorize:
    return CannotVectorize(
        site,
        ANY,
        f"the program does not vectorize over particles: {reason}; pass vectorize_particles=False,"
        " or let its layers accept leading dimensions",
    )


@contextmanager
def kept_buffers(*programs: Any) -> Iterator[None]:
    """Leave the buffers of modules (running statistics) as they were."""
    modules = [program for program in programs if isinstance(program, torch.nn.Module)]
    before = [(module, dict(module.named_buffers())) for module in modules]
    made = [b for _, buffers in before for b in buffers.values() if not torch.nn.parameter.is_lazy(b)]
    saved = [(buffer, buffer.detach().clone()) for buffer in made]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def modules_met() -> Iterator[Collection[torch.nn.Module]]:
    """The modules that are called within; each buffer of theirs is afterwards what it was before the first call."""
    met: dict[torch.nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(module: torch.nn.Module, inputs: Any) -> None:
        if module not in met:
            met[module] = [(buffer, buffer.detach().clone()) for buffer in module.buffers(recurse=False)]

    handle = register_module_forward_pre_hook(note)
    try:
        yield met.keys()
    finally:
        handle.remove()
        with torch.no_grad():
            for saved in met.values():
                for buffer, value in saved:
                    buffer.copy_(value)


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Modules in evaluation mode for a while."""
    modules = [m for program in programs if isinstance(program, torch.nn.Module) for m in program.modules()]
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""The structure of a Pyro program from its runs: sites, plates, and which site depends on which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from ..errors import BadInput, GumboError, first_line

TRACES = 20  # number of draws from the prior
RERUNS = 400  # the most runs that test dependencies by changing one site's value


@dataclass(frozen=True)
class Plate:
    """A plate that contains sites; ``size`` is that of the batch and −1 if the plate has none."""

    name: str
    dim: int
    size: int
    full_size: int
    rows: Tensor | None = field(default=None, compare=False)

    @property
    def subsampled(self) -> bool:
        return self.full_size != self.size


@dataclass(frozen=True)
class Seen:
    """A site in one run. ``plates`` are the vectorized ones, by name; ``scale`` excludes theirs."""

    name: str
    observed: bool
    value: Tensor
    plates: tuple[str, ...]
    batch_shape: torch.Size
    event_shape: torch.Size
    support: Any
    fn: Any = field(compare=False)
    mask: Any = field(compare=False, default=None)
    scale: Any = field(compare=False, default=1.0)
    summed: bool = False

    @property
    def is_factor(self) -> bool:
        return self.observed and self.value.numel() == 0


@dataclass
class Look:
    """One run of a program: its plates, and its sites in order."""

    plates: dict[str, Plate] = field(default_factory=dict)
    sites: dict[str, Seen] = field(default_factory=dict)

    @property
    def latent(self) -> dict[str, Seen]:
        """The sites that a guide draws, without those that the model's marks sum out."""
        return {name: site for name, site in self.sites.items() if not site.observed and not site.summed}

    @property
    def observed(self) -> dict[str, Seen]:
        return {name: site for name, site in self.sites.items() if site.observed}

    @property
    def depth(self) -> int:
        """The depth of nested plates."""
        return max((-plate.dim for plate in self.plates.values()), default=0)


class _Recorder(Messenger):
    """Records sites and plates. ``stands_in`` gives latent sites a value instead of a draw, ``rows`` plate rows."""

    def __init__(self, stands_in: Callable[[Any], Tensor | None], rows: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.look, self.stands_in, self.rows_given = Look(), stands_in, rows or {}
        self.rows: dict[str, Tensor] = {}

    def _pyro_sample(self, msg) -> None:
        if site_is_subsample(msg):
            if msg["value"] is None and msg["name"] in self.rows_given:
                msg["value"], msg["done"] = self.rows_given[msg["name"]], True
            return
        if msg["is_observed"] or msg["done"] or is_settled(msg):
            return
        value = self.stands_in(msg)
        if value is not None:
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg) -> None:
        if site_is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]
            return
        frames = [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
        own = 1.0
        for frame in frames:
            full = frame.size if frame.full_size is None else frame.full_size
            if frame.size > 0:
                own = own * full / frame.size
        if is_settled(msg) or (msg["is_observed"] and msg["mask"] is False):
            if isinstance(msg["fn"], TorchDistributionMixin) and not msg["is_observed"]:
                raise BadInput(
                    f"amortize: latent site {msg['name']!r} is a Delta, which draws nothing; write"
                    f" pyro.deterministic({msg['name']!r}, value), which needs no place in a guide"
                )
            return
        fn = msg["fn"]
        for frame in frames:
            size = (
                frame.size if frame.size >= 0 else fn.batch_shape[frame.dim] if len(fn.batch_shape) >= -frame.dim else 1
            )
            full = frame.full_size if frame.full_size not in (None, -1) else size
            known = self.look.plates.get(frame.name)
            if known is None or known.size < size:
                rows = self.rows.get(frame.name)
                self.look.plates[frame.name] = Plate(frame.name, frame.dim, size, full, rows)
        self.look.sites[msg["name"]] = Seen(
            name=msg["name"],
            observed=bool(msg["is_observed"]),
            value=msg["value"],
            plates=tuple(frame.name for frame in sorted(frames, key=lambda frame: frame.dim)),
            batch_shape=torch.Size(fn.batch_shape),
            event_shape=torch.Size(fn.event_shape),
            support=_support(fn),
            fn=fn,
            mask=msg["mask"],
            scale=_ratio(msg["scale"], own),
            summed=not msg["is_observed"] and bool(msg["infer"].get("enumerate")),
        )


def is_settled(msg: Mapping[str, Any]) -> bool:
    """Whether a site is not random: a deterministic one, or one without a distribution."""
    fn = msg["fn"]
    if msg["infer"].get("_deterministic") or not isinstance(fn, TorchDistributionMixin):
        return True
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__ == "Delta"


def _support(fn: Any) -> Any:
    try:
        return fn.support
    except (NotImplementedError, AttributeError):  # torch raises the first where a law has no support; others lack it
        return None


def _ratio(scale: Any, own: float) -> Any:
    ratio = scale / own
    return ratio if isinstance(ratio, Tensor) or abs(ratio - 1.0) > 1e-9 else 1.0


def bare(support: Any) -> Any:
    """A constraint without ``independent`` wrappers and without a mixture's wrapper."""
    while isinstance(support, constraints.independent) or type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


def whole(support: Any, event_dim: int) -> Any:
    """The constraint on a whole event."""
    inner = bare(support)
    return inner if inner.event_dim == event_dim else constraints.independent(inner, event_dim - inner.event_dim)


def reference(msg: Mapping[str, Any]) -> Tensor:
    """A value in the support of a site, without random numbers.

    Zero for real supports; for others the transform of zero; the first class.
    """
    fn = msg["fn"]
    shape, support = torch.Size(fn.batch_shape) + torch.Size(fn.event_shape), bare(_support(fn))
    like = next(_parameters(fn), None)
    zero = torch.zeros((), dtype=None if like is None else like.dtype, device=None if like is None else like.device)
    kind = type(support).__name__
    if kind in ("_OneHot", "_IntegerInterval", "_IntegerGreaterThan", "_Boolean") or getattr(support, "is_discrete", 0):
        if kind == "_OneHot":
            value = zero.expand(shape).clone()
            value[..., 0] = 1.0
            return value
        lower = getattr(support, "lower_bound", 0)
        value = (zero + lower).expand(shape)
        return value.long() if type(_innermost(fn)).__name__ == "Categorical" else value
    if support is None:  # any value serves
        return zero.expand(shape)
    try:
        transform = biject_to(whole(support, len(fn.event_shape)))
        return transform(zero.expand(transform.inverse_shape(shape)))
    except NotImplementedError:  # torch knows no transform to the support; the look needs the shape
        return zero.expand(shape)


def _parameters(fn: Any) -> Iterator[Tensor]:
    """The floating-point tensors that a distribution holds, and those of the distributions that it is composed of."""
    values = vars(fn).values()
    yield from (value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    for part in values:
        if isinstance(part, torch.distributions.Distribution):
            yield from _parameters(part)


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


_NOISY = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


@contextmanager
def left_alone(model: Callable) -> Iterator[None]:
    """Run ``model`` without gradients and without changes of its running statistics or the param store."""
    noisy = [part for part in (model.modules() if isinstance(model, nn.Module) else ()) if isinstance(part, _NOISY)]
    modes = [part.training for part in noisy]
    store = pyro.get_param_store()
    try:
        for part in noisy:
            part.training = False
        with torch.no_grad(), store.scope(store.get_state()):
            yield
    finally:
        for part, training in zip(noisy, modes, strict=True):
            part.training = training


def look_at(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Look:
    """One run of the model without draws: outer handlers only see the rows of subsampled plates."""
    recorder = _Recorder(reference)
    with left_alone(model), poutine.block(hide_fn=lambda msg: not site_is_subsample(msg)), recorder:
        model(*args, **kwargs)
    return recorder.look


def drawn_look(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], given: Mapping[str, Tensor] | None = None
) -> Look:
    """One run of the model with draws from the prior, or with the values that are ``given`` for some sites."""
    given = given or {}

    def stands_in(msg) -> Tensor | None:
        if msg["name"] in given:
            return given[msg["name"]]
        try:
            return msg["fn"].sample()
        except NotImplementedError:  # a distribution without a sampler, such as an improper prior
            return reference(msg)

    recorder = _Recorder(stands_in, given)
    with left_alone(model), poutine.block(), recorder:
        model(*args, **kwargs)
    return recorder.look


@dataclass
class Structure:
    """The structure found in draws from a model's prior.

    Attributes:
        looks: one per draw; all have the same latent sites.
        prior: for each site, in the model's order, the latent sites on which it depends.
        notes: remarks on dependencies that value tracking did not find.
    """

    looks: list[Look]
    prior: dict[str, tuple[str, ...]]
    notes: list[str]

    @property
    def first(self) -> Look:
        return self.looks[0]


def read(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Structure:
    """Run a model on its arguments with draws from the prior, and return its structure.

    Random state, the param store and running statistics are restored. Raises BadInput for models without a guide: a
    model that fails or observes nothing, and latent sites that exist in some draws only.
    """
    looks = []
    for _ in range(TRACES):
        try:
            looks.append(drawn_look(model, args, kwargs))
        except GumboError:
            raise
        except Exception as error:
            raise BadInput(
                f"amortize: the model fails on these arguments ({first_line(error, kind=True)}); give those that it"
                " takes, data included"
            ) from error
    _check(looks)
    tracked, failed = _tracked(model, args, kwargs, looks[0])
    changed, note = _by_perturbation(model, args, kwargs, looks)
    notes = [failed] if failed else []
    found = {
        name: tuple(
            above for above in looks[0].sites if above in tracked.get(name, ()) or above in changed.get(name, ())
        )
        for name in looks[0].sites
    }
    lost = {name: changed[name] - tracked.get(name, set()) for name in changed}
    if not failed and any(lost.values()):
        pairs = ", ".join(f"{above} → {name}" for name in lost for above in sorted(lost[name]))
        notes.append(f"value tracking is lost (.item(), NumPy, or writing into a tensor): by perturbation {pairs}")
    if note:
        notes.append(note)
    return Structure(looks, found, notes)


def _check(looks: Sequence[Look]) -> None:
    names = [frozenset(name for name, site in look.sites.items() if not site.observed) for look in looks]
    moving = frozenset().union(*names) - frozenset(names[0]).intersection(*names)
    if moving:
        name = sorted(moving)[0]
        count = sum(name in each for each in names)
        raise BadInput(
            f"amortize: latent site {name!r} is in {count} of {len(looks)} draws from the prior: an amortized guide"
            " needs the same sites in every draw; sample it always and mask it (poutine.mask), or write a guide"
        )
    first = looks[0]
    if not first.latent:
        why = (
            "all are summed out by their marks" if any(site.summed for site in first.sites.values()) else "it has none"
        )
        raise BadInput(f"amortize: the model has no latent sites to draw ({why}); fit it with an empty guide")
    if not first.observed:
        raise BadInput(
            "amortize: the model observes nothing on these arguments; pass the data with which it is conditioned"
        )
    for name, site in first.sites.items():
        others = [look.sites[name] for look in looks if name in look.sites]
        if site.observed:
            continue
        for other in others:
            for what in ("event_shape", "batch_shape", "plates"):
                if getattr(other, what) != getattr(site, what):
                    raise BadInput(
                        f"amortize: latent site {name!r} has {what.replace('_', ' ')} {_shown(getattr(site, what))} in"
                        f" one draw from the prior and {_shown(getattr(other, what))} in another; give it one shape"
                    )
            if not site.summed and not _same_support(site.support, other.support):
                raise BadInput(
                    f"amortize: the support of latent site {name!r} depends on other sites' values, and no guide can"
                    " follow it; sample it on a fixed support and transform it"
                )
            if (site.mask is None) != (other.mask is None) or not _equal(site.mask, other.mask):
                raise BadInput(
                    f"amortize: the mask of latent site {name!r} depends on draws; let it depend on data only"
                )


def _shown(value: Any) -> str:
    return str(tuple(value))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return one.shape == other.shape and bool((one == other).all())
    return one == other


def _same_support(one: Any, other: Any) -> bool:
    one, other = bare(one), bare(other)
    if type(one) is not type(other):
        return False
    return all(_equal(getattr(one, name, 0.0), getattr(other, name, 0.0)) for name in ("lower_bound", "upper_bound"))


def _tracked(model: Callable, args: tuple, kwargs: Mapping[str, Any], look: Look) -> tuple[dict[str, set[str]], str]:
    """For each site the latent sites upstream of it by Pyro's value tracking; and why, if that fails."""
    latent = {name for name, site in look.sites.items() if not site.observed}
    try:
        with left_alone(model), poutine.block():
            found = get_dependencies(model, args, dict(kwargs))["prior_dependencies"]
    except Exception as error:  # code of the user's on tensors of a class of Pyro's
        said = f"{type(error).__name__}: {first_line(error)[:80]}"
        return {}, f"value tracking fails in this model ({said}): dependencies by perturbation"
    return {name: {above for above in up if above in latent and above != name} for name, up in found.items()}, ""


def _by_perturbation(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], looks: Sequence[Look]
) -> tuple[dict[str, set[str]], str]:
    """For each site the latent sites whose change alone, with all other values fixed, changes its log-probability."""
    latent = [name for name, site in looks[0].sites.items() if not site.observed]
    times = min(6, RERUNS // max(1, len(latent)))
    if not times:
        return (
            {},
            f"{len(latent)} latent sites are too many to perturb one by one: dependencies by value tracking alone",
        )
    found: dict[str, set[str]] = {name: set() for name in looks[0].sites}
    seed = 0
    for one, other in zip(looks[:times], looks[1:], strict=False):
        kept = {name: one.sites[name].value for name in latent}
        before = _scores(model, args, kwargs, kept, seed)
        if before is None:
            continue
        for name in latent:
            after = _scores(model, args, kwargs, kept | {name: other.sites[name].value}, seed, scored_at=kept)
            for below, score in (after or {}).items():
                if below != name and below in before and not _equal(score, before[below]):
                    found.setdefault(below, set()).add(name)
    order = {name: place for place, name in enumerate(looks[0].sites)}
    return {
        name: {above for above in ups if order[above] < order[name]} for name, ups in found.items() if name in order
    }, ""


def _scores(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    seed: int,
    scored_at: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor] | None:
    """Log-probability of each site at given values; None where the model does not run on them."""
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        try:
            look = drawn_look(model, args, kwargs, values)
            scores = {}
            for name, site in look.sites.items():
                at = (scored_at or values).get(name, site.value)
                scores[name] = site.fn.log_prob(at) if not site.is_factor else site.fn.log_prob(site.value)
        except (RuntimeError, ValueError, IndexError, KeyError, ArithmeticError):
            return None
    return {name: torch.nan_to_num(score.detach()) for name, score in scores.items()}


# ---- covariates: arguments that come with the rows of a plate and are no observed site


@dataclass(frozen=True)
class Covariate:
    """An argument with a row for each element of some plates: its position in a call, and its axis of each plate."""

    path: tuple[Any, ...]
    axes: tuple[tuple[str, int], ...]

    def of(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        value: Any = (args, kwargs)
        for part in self.path:
            value = value[part]
        return torch.as_tensor(value)

    @property
    def name(self) -> str:
        place = self.path[1:]
        return ".".join(str(part) for part in place) if self.path[0] else f"argument {'.'.join(map(str, place))}"

    @property
    def plates(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)


def tensors_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor inside tuples, lists and mappings, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from tensors_in(one, (*path, key))
    elif isinstance(value, (list, tuple)):
        for key, one in enumerate(value):
            yield from tensors_in(one, (*path, key))


def covariates(model: Callable, args: tuple, kwargs: Mapping[str, Any], look: Look) -> list[Covariate]:
    """The arguments, other than the observed data, with a row for each element of a plate.

    An axis belongs to a plate where exchanging two of its rows changes the log-probabilities of those two elements of
    the plate's observed sites, and no other element's.
    """
    values = {name: site.value for name, site in look.sites.items() if not site.observed}
    values |= {plate.name: plate.rows for plate in look.plates.values() if plate.subsampled and plate.rows is not None}
    data = {site.value.untyped_storage().data_ptr() for site in look.observed.values() if site.value.numel()}
    before = _scores(model, args, kwargs, values, 0)
    found = []
    for path, tensor in tensors_in((args, dict(kwargs))):
        if before is None or tensor.dim() == 0 or tensor.untyped_storage().data_ptr() in data:
            continue
        axes: dict[str, int] = {}
        for plate in look.plates.values():
            seen = [site for site in look.observed.values() if plate.name in site.plates and not site.is_factor]
            if not seen or plate.size < 2:
                continue
            for axis, size in enumerate(tensor.shape):
                if size != plate.full_size and size != plate.size or axis in axes.values():
                    continue
                if _belongs(model, args, kwargs, values, before, path, tensor, axis, plate, seen):
                    axes[plate.name] = axis
                    break
        if axes:
            found.append(Covariate(path, tuple(axes.items())))
    return found


def _belongs(model, args, kwargs, values, before, path, tensor, axis, plate: Plate, seen: Collection[Seen]) -> bool:
    """Whether exchanging the rows of the plate's first and last element along an axis changes these two alone."""
    order = torch.arange(tensor.shape[axis], device=tensor.device)
    rows = plate.rows if plate.subsampled and tensor.shape[axis] == plate.full_size else order
    order[rows[[0, -1]]] = order[rows[[-1, 0]]]
    swapped = tensor.index_select(axis, order)
    new_args, new_kwargs = _replaced((args, dict(kwargs)), path, swapped)
    after = _scores(model, new_args, new_kwargs, values, 0)
    if after is None:
        return False
    changed = False
    for site in seen:
        one, other = before[site.name], after.get(site.name)
        if other is None or one.shape != other.shape or one.dim() < -plate.dim:
            return False
        moved = (one != other).movedim(plate.dim, 0).flatten(1).any(1) if one.dim() > 1 else one != other
        if moved[1:-1].any():
            return False
        changed |= bool(moved.any())
    return changed


def _replaced(value: Any, path: tuple[Any, ...], new: Tensor) -> Any:
    if not path:
        return new
    if isinstance(value, Mapping):
        return {key: _replaced(one, path[1:], new) if key == path[0] else one for key, one in value.items()}
    parts = [_replaced(one, path[1:], new) if place == path[0] else one for place, one in enumerate(value)]
    return parts if isinstance(value, list) else tuple(parts)


@contextmanager
def within(*contexts: Any) -> Iterator[None]:
    """Enter several contexts, the first one outermost; None is skipped."""
    with ExitStack() as stack:
        for context in contexts:
            if context is not None:
                stack.enter_context(context)
        yield

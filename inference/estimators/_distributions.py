"""Properties of distributions that estimators need: score, support, relaxation, linear extension.

Pyro wraps distributions (``.to_event``, ``.mask``, ``.expand_by``); every function here unwraps them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution, TorchDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import logits_to_probs

from ...errors import BadInput

Distribution = torch.distributions.Distribution

# torch and Pyro give these an `rsample` with a straight-through gradient, which is biased.
_STRAIGHT_THROUGH = tuple(
    found
    for module in (dist, torch.distributions)
    for name in (
        "OneHotCategoricalStraightThrough",
        "RelaxedOneHotCategoricalStraightThrough",
        "RelaxedBernoulliStraightThrough",
    )
    if (found := getattr(module, name, None)) is not None
)

# Their draws are rounded, and their `log_prob` is that of the draw before, which no copy of the value keeps.
_HIDES_ITS_DRAW = (dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough)


def elementary(fn: Distribution) -> Distribution:
    """The distribution under ``to_event``, ``mask`` and ``expand`` wrappers.

    >>> import pyro.distributions as dist
    >>> type(elementary(dist.Bernoulli(torch.ones(3) / 2).mask(True).to_event(1))).__name__
    'Bernoulli'
    """
    while _wraps(type(fn)):
        fn = fn.base_dist
    return fn


def without_to_event(fn: Any) -> Any:
    """The distribution under ``to_event`` alone; other wrappers stay."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


# Whether a class is a wrapper; asked several times a statement, and ``isinstance`` is slow for Pyro's classes.
@lru_cache(maxsize=4096)
def _wraps(kind: type) -> bool:
    return issubclass(kind, (torch.distributions.Independent, MaskedDistribution, ExpandedDistribution))


def is_deterministic(fn: Distribution) -> bool:
    return _is_delta(type(elementary(fn)))


@lru_cache(maxsize=4096)
def _is_delta(kind: type) -> bool:
    return issubclass(kind, dist.Delta)


def is_computed(site: Mapping[str, Any]) -> bool:
    """Whether a site records a value that others determine: ``pyro.deterministic``, or what ``poutine.reparam`` leaves.

    A reparametrised site is an observed Delta at the very tensor that it observes. A Delta that observes other numbers
    is data, and so is one with a density, by which a program writes a likelihood of its own.

    >>> import pyro.distributions as dist
    >>> value, data = torch.ones(3), torch.ones(3)
    >>> site = {"fn": dist.Delta(value, event_dim=1).mask(False), "is_observed": True, "infer": {}}
    >>> [is_computed({**site, "value": seen}) for seen in (value, data)]
    [True, False]
    """
    if site["infer"].get("_deterministic"):
        return True
    if not observes_itself(site):
        return False
    fn = site["fn"]
    masked = isinstance(fn, MaskedDistribution) and fn._mask is False
    return masked or not bool(elementary(fn).log_density.any())


def observes_itself(site: Mapping[str, Any]) -> bool:
    """Whether a site is an observed Delta at the very tensor that it observes."""
    fn = site["fn"]
    return site["is_observed"] and is_deterministic(fn) and _is_view(elementary(fn).v, site["value"])


def _is_view(point: Tensor, value: Any) -> bool:
    """Whether a point is the very tensor ``value``, or that tensor expanded, as a plate does."""
    if not isinstance(value, Tensor) or value.dim() > point.dim():
        return False
    sizes = zip(reversed(value.shape), reversed(point.shape), strict=False)
    return all(n in (1, m) for n, m in sizes) and value.expand(point.shape).is_set_to(point)


_LIBRARIES = ("torch", "pyro")
_LAW = frozenset({"sample", "rsample", "log_prob"})


def _has_own_law(kind: type) -> bool:
    """Whether a class body outside of these libraries has a draw or a density."""
    return kind.__module__.partition(".")[0] not in _LIBRARIES and not _LAW.isdisjoint(vars(kind))


@lru_cache(maxsize=4096)
def _is_of(kind: type, family: type) -> bool:
    return issubclass(kind, family) and not any(map(_has_own_law, kind.__mro__[: kind.__mro__.index(family)]))


def is_of(fn: Distribution, family: type) -> bool:
    """Whether ``fn`` has the law of a family: a user's subclass with its own draw or density has not.

    >>> import pyro.distributions as dist
    >>> class Rare(dist.Bernoulli):
    ...     def sample(self, sample_shape=()):
    ...         return super().sample(sample_shape) * super().sample(sample_shape)
    >>> [is_of(kind(0.5), torch.distributions.Bernoulli) for kind in (dist.Bernoulli, Rare)]
    [True, False]
    """
    return _is_of(type(elementary(fn)), family)


@lru_cache(maxsize=4096)
def inherits(kind: type, name: str) -> bool:
    """Whether a class takes an attribute, as its mean, from above a class with a draw or a density of its own.

    That attribute is of another law.
    """
    for base in kind.__mro__:
        if name in vars(base):
            return False
        if _has_own_law(base):
            return True
    return False


_MIXTURES = (dist.MixtureOfDiagNormals, dist.MixtureOfDiagNormalsSharedCovariance)

# The ``mean`` of these is a direction: that of the least expected squared distance along a circle or a sphere.
_DIRECTIONS = (torch.distributions.VonMises, dist.ProjectedNormal, dist.SineBivariateVonMises)


def why_no_expectation(fn: Distribution) -> str | None:
    """Why ``fn.mean`` is not the expectation E[z], or None if it is.

    >>> import pyro.distributions as dist
    >>> why_no_expectation(dist.VonMises(0.0, 1.0))
    'the mean of VonMises is a direction and not the expectation of its draws'
    >>> why_no_expectation(dist.Normal(0.0, 1.0)) is None
    True
    """
    if (reason := why_no_mean(fn)) is not None:
        return reason
    if _mean_is_direction(fn):
        return f"the mean of {describe(fn)} is a direction and not the expectation of its draws"
    return None


def why_no_mean(fn: Distribution) -> str | None:
    """Why ``fn.mean`` is no typical value of its draws, such as their expectation or direction, or None if it is."""
    base = elementary(fn)
    try:
        base.mean  # noqa: B018
    except (AttributeError, NotImplementedError):
        return f"{describe(fn)} has no mean in closed form"
    if inherits(type(base), "mean"):
        return f"{describe(fn)} has a draw or a density of its own and the mean of another law; define its mean"
    return None


def _mean_is_direction(fn: Distribution) -> bool:
    """Whether ``fn.mean`` is a direction, or is composed of the means of parts of which one is."""
    base = elementary(fn)
    owner = next(kind for kind in type(base).__mro__ if "mean" in vars(kind))
    if owner.__module__.partition(".")[0] not in _LIBRARIES:
        return False  # an expectation that a user wrote
    parts = (part for part in vars(base).values() if isinstance(part, Distribution))
    return owner in _DIRECTIONS or any(map(_mean_is_direction, parts))


def why_other_draws(fn: Distribution) -> str | None:
    """Why ``fn`` draws from another law than its ``log_prob``, or None if it does not; faults of torch and of Pyro.

    >>> import pyro.distributions as dist
    >>> why_other_draws(dist.LKJCholesky(2)) is None
    True
    >>> why_other_draws(dist.LKJCholesky(3)).split(";")[0]
    'LKJCholesky of dimension 3 draws from another law than its log_prob, a fault of torch'
    """
    base, what = elementary(fn), describe(fn)
    if is_of(fn, torch.distributions.LKJCholesky):
        row = base._beta.concentration1[..., -1]  # of the squared length of a vector of dim − 1 numbers
        if base.dim > 2 and (row != (base.dim - 1) / 2).any():
            remedy = "draw it as a transformed Normal, as AutoNormal does"
            return (
                f"{what} of dimension {base.dim} draws from another law than its log_prob, a fault of torch; {remedy}"
            )
    elif is_of(fn, dist.SineBivariateVonMises):
        return f"{what} draws from another law than its log_prob, a fault of Pyro; take two VonMises"
    elif isinstance(base, _HIDES_ITS_DRAW):
        kind = "OneHotCategorical" if base.event_shape else "Bernoulli"
        return f"{what} scores a relaxed draw and gives its rounded one; take {kind} with the word 'straight-through'"
    elif is_of(fn, dist.CoalescentTimes) and (base.rate.requires_grad or (base.rate != 1).any()):
        return f"{what} draws without its rate, a fault of Pyro; draw at rate 1 and divide by the rate"
    parts = [part for part in vars(base).values() if isinstance(part, Distribution)]
    return next((reason for part in parts if (reason := why_other_draws(part)) is not None), None)


def why_wrong_path(fn: Distribution) -> str | None:
    """Why the derivative of ``fn.rsample`` is wrong, or None if it is not; a fault of Pyro.

    >>> import pyro.distributions as dist
    >>> logits = torch.zeros(2, requires_grad=True)
    >>> why_wrong_path(dist.MixtureOfDiagNormals(torch.randn(2, 3), torch.ones(2, 3), logits)) is None
    False
    """
    if not any(is_of(fn, kind) for kind in _MIXTURES) or not elementary(fn).component_logits.requires_grad:
        return None
    return f"the derivative of a draw of {describe(fn)} with respect to component_logits is wrong, a fault of Pyro"


def path_at_half(fn: Distribution, drawn: Tensor) -> Tensor:
    """A draw of ``fn.rsample``, with the derivative that torch leaves out for a ContinuousBernoulli near p = 1/2.

    There the draw is uniform noise u to a thousandth, and its derivative with respect to the logit u (1 − u) / 2.

    >>> logits = torch.zeros((), requires_grad=True)
    >>> fn = dist.ContinuousBernoulli(logits=logits)
    >>> bool(torch.autograd.grad(path_at_half(fn, fn.rsample()), logits)[0] > 0)
    True
    """
    if not is_of(fn, torch.distributions.ContinuousBernoulli):
        return drawn
    base, noise = elementary(fn), drawn.detach()
    near = torch.where(base._outside_unstable_region(), 0.0, base.logits - base.logits.detach())
    return drawn + near * noise * (1 - noise) / 2


def numbers_of(fn: Distribution) -> Iterator[Tensor]:
    """The floating-point tensors of a distribution and of the distributions that it is composed of.

    >>> import pyro.distributions as dist
    >>> [number.item() for number in numbers_of(dist.GammaPoisson(torch.tensor(2.0), torch.tensor(1.0)))]
    [2.0, 1.0]
    """
    for item in vars(fn).values():
        if isinstance(item, Tensor) and item.is_floating_point():
            yield item
        elif isinstance(item, Distribution):
            yield from numbers_of(item)


def learnt_parts(fn: Distribution) -> tuple[str, ...]:
    """The names of the parts of a distribution that require grad, down to the tensors; one for a map with a network.

    >>> import pyro.distributions as dist
    >>> learnt_parts(dist.LogNormal(torch.zeros(2), torch.ones(2, requires_grad=True)).to_event(1))
    ('base_dist.scale',)
    """
    fn, found = elementary(fn), []
    for name, item in vars(fn).items():
        if isinstance(item, Tensor):
            found += [name] * item.requires_grad
        elif isinstance(item, Distribution):
            found += [f"{name}.{part}" for part in learnt_parts(item)]
    for place, part in enumerate(parts_of(getattr(fn, "transforms", ()))):
        most = 1 if isinstance(part, torch.nn.Module) else None
        found += [f"transforms.{place}" for _ in islice(_learnt_by(part), most)]
    return tuple(found)


def is_bernoulli(fn: Distribution) -> bool:
    return is_of(fn, torch.distributions.Bernoulli)


def is_one_hot(fn: Distribution) -> bool:
    return is_of(fn, torch.distributions.OneHotCategorical) and not is_straight_through(fn)


def is_straight_through(fn: Distribution) -> bool:
    return isinstance(elementary(fn), _STRAIGHT_THROUGH)


def is_discrete(fn: Distribution) -> bool:
    """Whether ``fn`` has a probability mass function, not a density."""
    fn = elementary(fn)
    if isinstance(fn, (torch.distributions.RelaxedBernoulli, torch.distributions.RelaxedOneHotCategorical)):
        return False
    support = support_of(fn)
    if callable(support) and not isinstance(support, constraints.Constraint):
        return False
    return bool(getattr(support, "is_discrete", False)) or isinstance(fn, torch.distributions.OneHotCategorical)


def support_of(fn: Distribution) -> object:
    """The support of an elementary distribution; None if it has none (a Rejector has its proposal's)."""
    if isinstance(fn, dist.Rejector):
        return support_of(elementary(fn.propose)) if isinstance(fn.propose, torch.distributions.Distribution) else None
    try:
        return fn.support
    except NotImplementedError:
        return None


def describe(fn: Distribution) -> str:
    """The name of the elementary distribution, for messages; that of its law where a class of gumbo is private.

    >>> from gumbo.guides.auto import _Joint
    >>> describe(_Joint(torch.zeros(2), torch.eye(2)))
    'MultivariateNormal'
    """
    kind = type(elementary(fn))
    while kind.__name__.startswith("_") and kind.__module__.startswith("gumbo."):
        kind = kind.__base__
    return kind.__name__


def clear_caches(fn: Distribution) -> None:
    """Clear values that transforms cache: a cached draw made without gradients has no score."""
    while fn is not None:
        if hasattr(fn, "clear_cache"):
            fn.clear_cache()
        fn = getattr(fn, "base_dist", None)


def samples_by_path(fn: Distribution) -> bool:
    """Whether ``fn.sample`` is torch's default, which is ``fn.rsample`` without gradients.

    >>> import pyro.distributions as dist
    >>> samples_by_path(dist.Laplace(0.0, 1.0).expand([3]).to_event(1)), samples_by_path(dist.Normal(0.0, 1.0))
    (True, False)
    """
    base = elementary(fn)
    while getattr(type(base), "sample", None) is torch.distributions.TransformedDistribution.sample:
        base = elementary(base.base_dist)
    return getattr(type(base), "sample", None) is torch.distributions.Distribution.sample


def log_prob_of(fn: Distribution, value: Tensor) -> Tensor:
    """``fn.log_prob(value)``, bit for bit, where coins of an event are summed before the sign changes.

    An event of 784 coins is otherwise read and written once more in each direction.

    >>> import pyro.distributions as dist
    >>> fn, value = dist.Bernoulli(logits=torch.randn(5, 7)).to_event(1), torch.ones(5, 7)
    >>> torch.equal(log_prob_of(fn, value), fn.log_prob(value))
    True
    """
    if _sums(type(fn)) and _is_coin(type(fn.base_dist)) and not fn.base_dist._validate_args:
        logits = fn.base_dist.logits
        if logits.shape != value.shape:
            logits, value = torch.broadcast_tensors(logits, value)
        lost = F.binary_cross_entropy_with_logits(logits, value, reduction="none")
        dims = fn.reinterpreted_batch_ndims
        return -(lost.sum(-1) if dims == 1 else sum_rightmost(lost, dims))  # the latter reshapes first
    return fn.log_prob(value)


# Asked at each statement; a subclass may have a density of its own.
@lru_cache(maxsize=4096)
def _sums(kind: type) -> bool:
    own = getattr(kind, "log_prob", None)
    return issubclass(kind, torch.distributions.Independent) and own is torch.distributions.Independent.log_prob


@lru_cache(maxsize=4096)
def _is_coin(kind: type) -> bool:
    own = getattr(kind, "log_prob", None)
    return issubclass(kind, torch.distributions.Bernoulli) and own is torch.distributions.Bernoulli.log_prob


def find_probs_once(fn: Distribution) -> None:
    """Compute the probabilities of a site from its logits once, not again for each particle that shares them."""
    base = elementary(fn)
    base = getattr(base, "_categorical", base)
    if not isinstance(base, (torch.distributions.Bernoulli, torch.distributions.Categorical)):
        return
    logits = vars(base).get("logits")
    if logits is None or "probs" in vars(base):
        return
    coins = isinstance(base, torch.distributions.Bernoulli)
    first = [slice(1) if stride == 0 else slice(None) for stride in logits.stride()]
    if not coins:
        first[-1] = slice(None)
    if slice(1) in first:
        with torch.enable_grad():  # as torch does, whose property keeps them
            base.probs = logits_to_probs(logits[tuple(first)], is_binary=coins).expand(logits.shape)


def score_log_prob(fn: Distribution, value: Tensor) -> Tensor:
    """Log-probability without the distribution's own mask, which would set the score of a draw to zero.

    >>> import pyro.distributions as dist
    >>> fn = dist.Bernoulli(torch.tensor([0.25, 0.5])).mask(False).to_event(1)
    >>> bool(torch.allclose(score_log_prob(fn, torch.ones(2)), torch.tensor(0.125).log()))
    True
    """
    if isinstance(fn, MaskedDistribution):
        return score_log_prob(fn.base_dist, value)
    if isinstance(fn, torch.distributions.Independent) and has_own_mask(fn):
        return sum_rightmost(score_log_prob(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    return log_prob_of(fn, value)


def has_score_term(fn: Distribution) -> bool:
    """Whether a reparameterized draw has a score term besides its path, as for a rejection sampler.

    Pyro's distributions define ``score_parts`` for this.

    >>> from pyro.distributions.testing.rejection_gamma import RejectionGamma
    >>> has_score_term(RejectionGamma(torch.tensor(2.0), torch.tensor(1.0)).to_event(0))
    True
    """
    return _own_score_parts(elementary(fn))


def _own_score_parts(base: Distribution) -> bool:
    return getattr(type(base), "score_parts", None) not in (None, PyroDistribution.score_parts)


def hides_score_term(fn: Distribution) -> bool:
    """Whether ``fn`` is composed of draws with a score term, and has no ``score_parts`` that returns it."""
    base = elementary(fn)
    return not _own_score_parts(base) and any(
        isinstance(part, torch.distributions.Distribution) and (has_score_term(part) or hides_score_term(part))
        for part in vars(base).values()
    )


def score_term(fn: Distribution, value: Tensor) -> Tensor | None:
    """The term whose gradient times the cost is added to the pathwise gradient, without masks; None if there is none.

    ``value`` must be the tensor that ``fn`` drew, since some distributions store how they drew it (Naesseth et al.
    2017, arXiv 1610.05683).
    """
    if isinstance(fn, (MaskedDistribution, ExpandedDistribution)):
        found = score_term(fn.base_dist, value)
        return found if found is None else found.expand(fn.batch_shape)
    if isinstance(fn, torch.distributions.Independent):
        found = score_term(fn.base_dist, value)
        return found if found is None else sum_rightmost(found, fn.reinterpreted_batch_ndims)
    found = fn.score_parts(value).score_function
    return found if isinstance(found, Tensor) else None


def has_own_mask(fn: Distribution) -> bool:
    while fn is not None:
        if isinstance(fn, MaskedDistribution):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def has_transforms(fn: Distribution) -> bool:
    """Whether draws pass through transforms, whose inverse is needed to score a value."""
    return isinstance(elementary(fn), torch.distributions.TransformedDistribution)


def _tensors_of(constraint: object, depth: int = 0):
    for item in vars(constraint).values() if hasattr(constraint, "__dict__") else ():
        for found in item if isinstance(item, (list, tuple)) else (item,):
            if isinstance(found, Tensor):
                yield found
            elif isinstance(found, constraints.Constraint) and depth < 8:
                yield from _tensors_of(found, depth + 1)


def has_tensors(constraint: object) -> bool:
    """Whether a constraint holds tensors, whose values may change.

    >>> has_tensors(constraints.boolean), has_tensors(constraints.interval(0.0, torch.ones(())))
    (False, True)
    """
    return any(True for _ in _tensors_of(constraint))


def support_moves(fn: Distribution) -> bool:
    """Whether the support depends on a tensor that requires grad.

    The score function is then wrong: it misses mass that enters or leaves at the boundary.

    >>> import pyro.distributions as dist
    >>> theta = torch.tensor(2.0, requires_grad=True)
    >>> support_moves(dist.Uniform(0.0, theta)), support_moves(dist.Normal(theta, 1.0))
    (True, False)
    """
    fn = elementary(fn)
    if any(tensor.requires_grad for tensor in _tensors_of(support_of(fn))):
        return True
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return support_moves(fn.base_dist) or _bounds_move(support_of(fn.base_dist), fn.transforms)
    return False


def _bounds_move(support: object, transforms: Sequence[object]) -> bool:
    """Whether learnable maps move the bounds of a support.

    They do not where fixed maps took these to infinity, and where a bound is a fixed point, as 0 is of a scale.
    """
    bounds, known = _bounds(support), bool(_ends(support))
    discrete = bool(getattr(support, "is_discrete", False))
    for transform in parts_of(transforms) if bounds else ():
        if not _learnable(transform):
            bounds = [_image(bound, transform) for bound in bounds]
            continue
        finite = [bound for bound in bounds if bound.isfinite().any()]
        if finite and (discrete or not known or any(_is_moved(bound, transform) for bound in finite)):
            return True
        images = [_image(bound, transform) for bound in finite]
        infinite = [bound for bound in bounds if not bound.isfinite().all()]
        bounds = images + (infinite and (_bounds(transform.codomain) or infinite))
    return False


def _bounds(support: object) -> list[Tensor]:
    """The ends of an interval; 0 stands for those of any other bounded support."""
    return _ends(support) or ([torch.zeros(())] if list(_tensors_of(support)) else [])


def _ends(support: object) -> list[Tensor]:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    return [_rounded(torch.as_tensor(end)).double().detach() for end in ends if end is not None]


def _rounded(end: Tensor) -> Tensor:
    """0 and 1 for the numbers next to them, by which torch's Gumbel keeps its Uniform from infinite values."""
    if not end.is_floating_point():
        return end
    limits = torch.finfo(end.dtype)
    end = torch.where(end == limits.tiny, torch.zeros_like(end), end)
    return torch.where(end == 1 - limits.eps, torch.ones_like(end), end)


def _image(bound: Tensor, transform: Any) -> Tensor:
    try:
        image = transform(bound).detach()
    except (RuntimeError, ValueError, NotImplementedError):  # a map of vectors: bounds stay bounds
        return bound
    ends = _bounds(transform.domain)
    if not _bounds(transform.codomain) and any(end.dim() == 0 and bool((bound == end).all()) for end in ends):
        return torch.full_like(bound, torch.inf).copysign(image)  # a logit, say, that torch keeps finite
    return image


def _is_moved(bound: Tensor, transform: Any) -> bool:
    """Whether the image of a bound depends on what a map learns; True where that cannot be found."""
    while isinstance(transform, torch.distributions.transforms.IndependentTransform):
        transform = transform.base_transform
    if transform.domain.event_dim:
        return True
    learnt = list(_learnt_by(transform))
    try:
        with torch.enable_grad():
            image = transform(bound)
            image = torch.where(image.isfinite(), image, torch.zeros_like(image)).flatten()
            # Unlike weights, so that the slopes of several elements do not cancel.
            weights = 1 + (torch.arange(len(image), dtype=image.dtype, device=image.device) * 0.618034).frac()
            slopes = torch.autograd.grad((weights * image).sum(), learnt, allow_unused=True)
    except (RuntimeError, ValueError, NotImplementedError):
        return True
    return any(slope is not None and bool((slope != 0).any()) for slope in slopes)


def parts_of(transforms: Sequence[object]) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, torch.distributions.ComposeTransform):
            yield from parts_of(transform.parts)
        else:
            yield transform


def _learnable(transform: object) -> bool:
    return any(True for _ in _learnt_by(transform))


def _learnt_by(transform: object) -> Iterator[Tensor]:
    """The tensors that require grad of a map and of the maps that it is made of, such as the one that it inverts."""
    if isinstance(transform, torch.nn.Module):
        yield from (parameter for parameter in transform.parameters() if parameter.requires_grad)
    inverse = isinstance(transform, torch.distributions.transforms._InverseTransform)
    for name, item in vars(transform).items():
        if isinstance(item, Tensor) and item.requires_grad:
            yield item
        elif isinstance(item, torch.distributions.Transform) and (inverse or name != "_inv"):  # else its own inverse
            yield from _learnt_by(item)
    for part in getattr(transform, "parts", ()):
        yield from _learnt_by(part)


CATEGORICAL = "_pyro_categorical_support"  # by it Categorical.log_prob knows its own list, and spares a gather


def coordinate_values(fn: Distribution) -> Tensor | str:
    """The values of one coordinate, ``(V, *element)``, or the reason why they cannot be enumerated.

    >>> import pyro.distributions as dist
    >>> coordinate_values(dist.OneHotCategorical(logits=torch.zeros(2, 3)).to_event(1)).shape
    torch.Size([3, 3])
    """
    base = elementary(fn)
    if not getattr(base, "has_enumerate_support", False):
        return f"{describe(fn)} has no finite support"
    try:
        values = base.enumerate_support(expand=False)
    except (NotImplementedError, ValueError) as error:
        return f"its support cannot be enumerated ({error})"
    if isinstance(base, dist.Empirical):
        if base.batch_shape:
            return "the atoms of an Empirical differ between the elements of its batch"
        values = values.unique(dim=0)  # log_prob adds the weights of equal atoms
    listed = values.reshape(values.shape[:1] + tuple(base.event_shape))
    if hasattr(values, CATEGORICAL):
        setattr(listed, CATEGORICAL, getattr(values, CATEGORICAL))
    return listed


def finite_support(fn: Distribution, *, joint: int, limit: int) -> Tensor | str:
    """Every value of ``fn``, along a new leftmost dimension, or the reason why they cannot be enumerated.

    The values are the product over the independent coordinates of the event, and over the ``joint`` rightmost
    dimensions of the batch; elements of the other batch dimensions all take the same value.

    >>> import pyro.distributions as dist
    >>> coin = dist.Bernoulli(torch.full((3,), 0.5))
    >>> finite_support(coin, joint=0, limit=99).shape, finite_support(coin, joint=1, limit=99).shape
    (torch.Size([2, 3]), torch.Size([8, 3]))
    >>> finite_support(coin.to_event(1), joint=0, limit=99).shape
    torch.Size([8, 3])
    """
    values = coordinate_values(fn)
    return values if isinstance(values, str) else listed_support(fn, values, joint=joint, limit=limit)


def listed_support(fn: Distribution, values: Tensor, *, joint: int, limit: int) -> Tensor | str:
    """:func:`finite_support` for coordinates with these values, ``(V, *element)``."""
    size, event = values.shape[0], tuple(fn.event_shape)
    batch, together = tuple(fn.batch_shape), _together(fn, joint)
    coordinates = _coordinates(fn, values, joint)
    if size**coordinates > limit:
        over = "jointly over its plates " if joint else ""
        return f"listing it {over}takes {size}^{coordinates} values, more than the limit of {limit}"
    axes = [torch.arange(size, device=values.device)] * coordinates
    grid = torch.cartesian_prod(*axes).reshape(-1, coordinates)
    apart = len(batch) - len(together)
    listed = values[grid].reshape((len(grid),) + (1,) * apart + together + event)
    return listed.expand((len(grid),) + batch + event)


def list_size(fn: Distribution, values: Tensor, joint: int) -> tuple[int, int]:
    """The number of values of :func:`listed_support`, and the number of elements of each.

    >>> import pyro.distributions as dist
    >>> list_size(dist.Bernoulli(torch.full((3,), 0.5)), torch.tensor([0.0, 1.0]), joint=1)
    (8, 3)
    """
    coordinates = _coordinates(fn, values, joint)
    return len(values) ** coordinates, coordinates * math.prod(values.shape[1:])


def _together(fn: Distribution, joint: int) -> tuple[int, ...]:
    batch = tuple(fn.batch_shape)
    return batch[len(batch) - joint :] if joint else ()


def _coordinates(fn: Distribution, values: Tensor, joint: int) -> int:
    event = tuple(fn.event_shape)
    return math.prod(_together(fn, joint)) * math.prod(event[: len(event) - (values.dim() - 1)])


def rewrap(fn: Distribution, change: Callable[[Distribution], Distribution]) -> Distribution:
    """Apply ``change`` to the elementary distribution, and wrap the result as before."""
    if isinstance(fn, MaskedDistribution):
        return rewrap(fn.base_dist, change).mask(fn._mask)
    if isinstance(fn, torch.distributions.Independent):
        return rewrap(fn.base_dist, change).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return rewrap(fn.base_dist, change).expand(fn.batch_shape)
    return change(fn)


def turns_validation_off(fn: Distribution | None) -> bool:
    """Whether the program sets ``validate_args=False`` for this distribution; call it with validation on by default."""
    while fn is not None:
        if vars(fn).get("_validate_args") is False:
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def unvalidated(fn: Distribution) -> Distribution:
    """The same distribution without validation, so that it scores any value, such as a count of 1.5.

    >>> import pyro.distributions as dist
    >>> round(unvalidated(dist.Poisson(2.0)).log_prob(torch.tensor(1.5)).item(), 4)
    -1.245
    """

    def change(base: Distribution) -> Distribution:
        base = copy.copy(base)
        base._validate_args = False
        return base

    return rewrap(fn, change)


def without_own_validation(fn: Distribution) -> Distribution:
    """The same distribution without its own validation setting; itself if it has none.

    ``expand`` copies the current global setting into a distribution, which then ignores ``pyro.validation_enabled``.

    >>> import pyro.distributions as dist
    >>> made = dist.Normal(0.0, 1.0).expand([2])
    >>> "_validate_args" in vars(made), "_validate_args" in vars(without_own_validation(made))
    (True, False)
    """
    parts = {name: value for name, value in vars(fn).items() if isinstance(value, torch.distributions.Distribution)}
    changed = {name: without_own_validation(value) for name, value in parts.items()}
    if "_validate_args" not in vars(fn) and all(changed[name] is value for name, value in parts.items()):
        return fn
    fn = copy.copy(fn)
    vars(fn).update(changed)
    vars(fn).pop("_validate_args", None)
    return fn


def logits_of(fn: Distribution) -> Tensor:
    """Logits of a Bernoulli or one-hot site, of shape ``batch_shape + event_shape``; normalized for one-hots."""
    logits = elementary(fn).logits
    return logits.expand(tuple(fn.batch_shape) + tuple(fn.event_shape))


class _OtherDensity(TorchDistribution):
    """Replaces the log-density of the elementary distribution and keeps its wrappers."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base_dist: Distribution):
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    def sample(self, sample_shape=()):
        return self.base_dist.sample(sample_shape)

    def _elementary_log_prob(self, fn: Any, value: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _elementary_log_prob(fn, value)")

    def _under(self, fn: Distribution, value: Tensor) -> Tensor:
        if isinstance(fn, MaskedDistribution):
            return scale_and_mask(self._under(fn.base_dist, value), mask=torch.as_tensor(fn._mask))
        if isinstance(fn, torch.distributions.Independent):
            return sum_rightmost(self._under(fn.base_dist, value), fn.reinterpreted_batch_ndims)
        if isinstance(fn, ExpandedDistribution):
            return self._under(fn.base_dist, value)
        return self._elementary_log_prob(fn, value)


class LinearExtension(_OtherDensity):
    """A discrete distribution whose log pmf is extended linearly to relaxed values: Σᵢ yᵢ log πᵢ.

    At one-hot (or binary) values it equals the pmf; between them it is the expectation of log π under y. A discrete
    prior is thus never compared with a density. Jang et al. 2017 (arXiv 1611.01144), appendix.

    >>> import pyro.distributions as dist
    >>> fn = dist.OneHotCategorical(probs=torch.tensor([0.25, 0.75]))
    >>> round(LinearExtension(fn).log_prob(torch.tensor([0.5, 0.5])).exp().item() ** 2, 4)
    0.1875
    """

    @property
    def support(self) -> constraints.Constraint:
        inner = constraints.simplex if is_one_hot(self.base_dist) else constraints.unit_interval
        extra = len(self.event_shape) - inner.event_dim
        return constraints.independent(inner, extra) if extra else inner

    def expand(self, batch_shape, _instance=None):
        return LinearExtension(self.base_dist.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._under(self.base_dist, value)

    def _elementary_log_prob(self, fn: Any, value: Tensor) -> Tensor:
        if hasattr(fn, "relaxed_log_prob"):  # the distribution defines its own extension
            return fn.relaxed_log_prob(value)
        if inherits(type(fn), "logits"):
            raise BadInput(
                f"{describe(fn)} has a draw or a density of its own, which its logits do not give between its values:"
                " define relaxed_log_prob(value), or take an estimator that needs none, as rloo or enumerate"
            )
        if isinstance(fn, torch.distributions.OneHotCategorical):
            # A class with probability zero and value zero contributes zero: 0 · log 0 = 0.
            impossible = fn.logits.isneginf() & (value == 0)
            return (value * fn.logits.masked_fill(impossible, 0.0)).sum(-1)
        logits, value = torch.broadcast_tensors(fn.logits, value)
        return -F.binary_cross_entropy_with_logits(logits, value, reduction="none")


def relaxed(fn: Distribution, temperature: Tensor | float) -> Distribution:
    """The Concrete counterpart of a Bernoulli or one-hot site (Maddison et al. 2017, arXiv 1611.00712)."""

    def change(base: Distribution) -> Distribution:
        if not hasattr(base, "logits"):
            raise BadInput(
                f"{describe(base)} has no Concrete counterpart to be weighed by: take 'gumbel-softmax', which extends"
                " the discrete distribution itself"
            )
        tau = torch.as_tensor(temperature, dtype=base.logits.dtype, device=base.logits.device)
        if isinstance(base, torch.distributions.Bernoulli):
            return dist.RelaxedBernoulli(tau, logits=base.logits).expand(base.batch_shape)
        return dist.RelaxedOneHotCategorical(tau, logits=base.logits).expand(base.batch_shape)

    return rewrap(fn, change)


class AtLogValue(_OtherDensity):
    """A relaxed distribution evaluated at one draw through the draw's logarithm (or logit).

    At low temperatures the draw rounds to 0 and 1, where the density overflows; its logarithm does not.
    """

    has_rsample = True

    def __init__(self, base_dist: Distribution, unrounded: Tensor):
        super().__init__(base_dist)
        self.unrounded = unrounded

    @property
    def support(self) -> constraints.Constraint:
        return self.base_dist.support

    def expand(self, batch_shape, _instance=None):
        return AtLogValue(self.base_dist.expand(batch_shape), self.unrounded)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._under(self.base_dist, self.unrounded)

    def _elementary_log_prob(self, fn: Any, value: Tensor) -> Tensor:
        if isinstance(fn, torch.distributions.RelaxedOneHotCategorical):
            return fn.base_dist.log_prob(value) - value.sum(-1)
        return fn.base_dist.log_prob(value) + F.softplus(value) + F.softplus(-value)


def relaxed_draw(fn: Distribution) -> tuple[Tensor, Tensor]:
    """A reparameterized draw of a relaxed distribution, and its logarithm (or logit)."""
    base = elementary(fn)
    shape = tuple(fn.batch_shape) + tuple(fn.event_shape)
    missing = len(shape) - len(base.batch_shape) - len(base.event_shape)
    unrounded = base.base_dist.rsample(torch.Size(shape[:missing]))
    unrounded = unrounded.expand(shape)
    if isinstance(base, torch.distributions.RelaxedOneHotCategorical):
        # Normalizing again keeps the draw on the simplex where the logarithms are too large to be exact.
        return unrounded.softmax(-1), unrounded
    return base.transforms[-1](unrounded), unrounded

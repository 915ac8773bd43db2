"""Sites of a run, and runs of many draws at once by ``torch.vmap`` for programs that take no plate of draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch.overrides import TorchFunctionMode

from ...errors import BadInput


def random_sites(trace: Trace) -> Iterator[tuple[str, dict]]:
    """Sample sites by name, without subsampling sites."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def scale_of(site: Mapping[str, Any]) -> Any:
    """The scale of a site, without that of subsampling."""
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.full_size and frame.full_size != frame.size:
            scale = scale * (frame.size / frame.full_size)
    return scale


def unmasked(site: Mapping[str, Any]) -> torch.Tensor | None:
    """Which numbers of a site's value are unmasked, by the masks of the program and of the distribution."""
    fn, found = site["fn"], None
    shape = torch.broadcast_shapes(fn.batch_shape + fn.event_shape, site["value"].shape)
    masks = [] if site["mask"] is None else [(site["mask"], fn.event_dim)]
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    for mask, event in masks:
        mask = torch.as_tensor(mask, device=site["value"].device)
        one = mask.reshape(mask.shape + (1,) * event).expand(shape)
        found = one if found is None else found & one
    return found


@dataclass(frozen=True)
class Coordinates:
    """Log-probabilities ``(…, *coordinates)`` of a site's coordinates, ``depth`` dimensions of them.

    ``exact`` says whether they sum to the site's log-probability; otherwise they are those of its marginals.
    """

    log_prob: torch.Tensor
    depth: int
    exact: bool


class Seen:
    """A site of a run, whose properties are computed on access and cached."""

    def __init__(self, site: Mapping[str, Any]):
        self.site = site
        # A plate without a size has the length of its contents, which `picked` computes.
        self.sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized and f.size != -1}

    @cached_property
    def value(self) -> torch.Tensor:
        return self.site["value"].detach()

    @cached_property
    def log_prob(self) -> torch.Tensor:
        """With the mask, without scales; ``(*batch)`` in the program's own shape."""
        site = self.site
        found = None if site["args"] or site["kwargs"] else coins_log_prob(site["fn"], site["value"])
        if found is None:
            found = torch.as_tensor(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))
        return (scale_and_mask(found, 1.0, site["mask"]) if site["mask"] is not None else found).detach()

    @cached_property
    def scaled_log_prob(self) -> torch.Tensor:
        """With the scales other than subsampling scales."""
        scale = scale_of(self.site)
        return self.log_prob if isinstance(scale, (int, float)) and scale == 1 else self.log_prob * scale

    @cached_property
    def shown(self) -> torch.Tensor | None:
        """Which numbers of the value are unmasked, ``(*batch, *event)``; None without a mask."""
        return unmasked(self.site)

    def coordinates(self, event: tuple[int, ...]) -> Coordinates | None:
        """Those of the site's coordinates; None if they are dependent."""
        split = coordinatewise(self.site["fn"], event)
        if split is None:
            return None
        single, depth, exact = split
        return Coordinates(single.log_prob(self.site["value"]).detach(), depth, exact)


def coins_log_prob(fn: Any, value: Any) -> torch.Tensor | None:
    """The log-probability of independent coins with logits in three passes over them; None for anything else.

    Each is value · logit − log(1 + exp(logit)); a value for all draws is not copied for each. Faster than torch's form
    without gradients, and slower with them.
    """
    coins, rank = fn, 0
    while type(coins) is dist.Independent:
        coins, rank = coins.base_dist, rank + coins.reinterpreted_batch_ndims
    if type(coins) is not dist.Bernoulli or "logits" not in vars(coins) or not isinstance(value, torch.Tensor):
        return None
    logits = coins.logits
    if not rank or value.dtype != logits.dtype or torch.broadcast_shapes(value.shape, logits.shape) != logits.shape:
        return None
    if coins._validate_args:
        coins._validate_sample(value)
    less = torch.nn.functional.softplus(logits, threshold=50.0)  # beyond it the difference is below any rounding
    if less.requires_grad or value.requires_grad or torch._C._are_functorch_transforms_active():
        less = less.addcmul(value, logits, value=-1)
    else:
        less.addcmul_(value, logits, value=-1)
    return -less.sum(list(range(-rank, 0)))


class Lane(Seen):
    """A site of a vmapped run: all numbers ``(count, …)`` are computed in that run."""

    def __init__(self, site: Mapping[str, Any], found: Mapping[str, torch.Tensor], split: tuple[int, bool] | None):
        super().__init__(site)
        self.value, self.log_prob = found["value"], found["log_prob"]
        self.scaled_log_prob = found.get("scaled", self.log_prob)
        self.shown = found.get("shown")
        self._coordinates = None if split is None else Coordinates(found["coordinates"], *split)

    def coordinates(self, event: tuple[int, ...]) -> Coordinates | None:
        return self._coordinates


def coordinatewise(fn: Any, event: tuple[int, ...]) -> tuple[Any, int, bool] | None:
    """The distribution of a site's coordinates, their number of event dimensions, and whether they are independent.

    None if they are dependent with unknown marginals.
    """
    depth = 0
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        if isinstance(fn, torch.distributions.Independent):
            depth += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    tied = len(event) - depth
    if tied == 1 and isinstance(fn, _JOINTLY_NORMAL):
        return dist.Normal(fn.loc, fn.variance.sqrt()), depth + 1, False
    if isinstance(fn, dist.Delta) or (tied and not isinstance(fn, torch.distributions.OneHotCategorical)):
        return None
    return fn, depth, True


_JOINTLY_NORMAL = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)


def outside(name: str) -> BadInput:
    return BadInput(f"site {name!r} has a value outside the support of its distribution: fix the guide or the data")


# --- many draws by vmap -----------------------------------------------------------------------------------------------

# Functions that make or copy memory, into which a program may then write its draws.
_MEMORY = {
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.empty_like,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    torch.clone,
    torch.Tensor.new,
    torch.Tensor.new_empty,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_full,
    torch.Tensor.clone,
}


class _OwnMemory(TorchFunctionMode):
    """Gives each vmap lane its own new memory: vmap refuses to write a lane's numbers into shared memory."""

    def __init__(self, lane: torch.Tensor):
        super().__init__()
        self.yes = lane >= 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.new and all(isinstance(size, (int, torch.Size)) for size in args[1:]):
            func = torch.Tensor.new_empty  # which vmap also serves in torch 2.4
        made = func(*args, **(kwargs or {}))
        return torch.where(self.yes, made, made) if func in _MEMORY else made


class _Drawn(Messenger):
    """Draws from the families whose sampler vmap does not support."""

    def _pyro_sample(self, msg) -> None:
        if msg["value"] is not None or msg["is_observed"] or site_is_subsample(msg):
            return
        base = msg["fn"]
        while isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        drawing = _DRAWINGS.get(type(base))
        if drawing is not None:
            msg["value"] = drawing(base)


_DRAWINGS: dict[type, Callable[[Any], torch.Tensor]] = {
    dist.Beta: lambda beta: torch._sample_dirichlet(beta._dirichlet.concentration)[..., 0],
    dist.Dirichlet: lambda dirichlet: torch._sample_dirichlet(dirichlet.concentration),
    dist.Binomial: lambda binomial: torch.binomial(binomial.total_count + 0 * binomial.probs, binomial.probs),
}


def run_lanes(
    once: Callable[[Mapping[str, torch.Tensor]], Trace],
    values: Mapping[str, torch.Tensor],
    count: int,
    events: Mapping[str, tuple[int, ...]],
    device: torch.device,
    masked: frozenset[str] = frozenset(),
) -> dict[str, Lane]:
    """``once`` at each of the ``count`` values, all in one run. ``events`` are the sites' event shapes, ``masked`` the
    sites whose masks are needed.

    Validation branches on numbers that differ between lanes; it is off inside, and supports are checked here. Raises
    vmap's own error for a program that it cannot run.
    """
    lanes = _Lanes(events, masked)

    def lane(number: torch.Tensor, given: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        with _OwnMemory(number):
            with _Drawn():
                trace = once(given)
            return lanes.numbers(trace)

    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop")
        # vmap gives this warning when it mixes up the lanes.
        warnings.filterwarnings("error", message=".*was resized")
        numbers = torch.arange(count, device=device)
        found = torch.vmap(lane, randomness="different")(numbers, dict(values))
    return lanes.of(found)


def run_in_turn(
    once: Callable[[Mapping[str, torch.Tensor]], Trace],
    values: Mapping[str, torch.Tensor],
    count: int,
    events: Mapping[str, tuple[int, ...]],
    masked: frozenset[str] = frozenset(),
) -> dict[str, Lane]:
    """What `run_lanes` returns, from one run after the other."""
    lanes = _Lanes(events, masked)
    found = [lanes.numbers(once({name: value[number] for name, value in values.items()})) for number in range(count)]
    return lanes.of(
        {
            name: {key: torch.stack([one[name][key] for one in found]) for key in of_site}
            for name, of_site in found[0].items()
        }
    )


class _Lanes:
    """The numbers of each site in one lane, and the sites of all lanes."""

    def __init__(self, events: Mapping[str, tuple[int, ...]], masked: frozenset[str]):
        self.events, self.masked = events, masked
        self.sites: dict[str, Any] = {}
        self.splits: dict[str, tuple[int, bool] | None] = {}
        self.checked = torch.distributions.Distribution._validate_args

    def numbers(self, trace: Trace) -> dict[str, dict[str, torch.Tensor]]:
        found = {}
        for name, site in random_sites(trace):
            seen = Seen(site)
            found[name] = numbers = {"value": seen.value, "log_prob": seen.log_prob}
            if seen.scaled_log_prob is not seen.log_prob:
                numbers["scaled"] = seen.scaled_log_prob
            if name in self.masked and seen.shown is not None:
                numbers["shown"] = seen.shown
            split = seen.coordinates(self.events[name])
            self.splits[name] = None if split is None else (split.depth, split.exact)
            if split is not None:
                numbers["coordinates"] = split.log_prob
            if self.checked and validates(site["fn"]):
                numbers["inside"] = site["fn"].support.check(site["value"])
            self.sites[name] = site
        return found

    def of(self, found: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Lane]:
        for name, of_site in found.items():
            if "inside" in of_site and not bool(of_site["inside"].all()):
                raise outside(name)
        return {name: Lane(self.sites[name], of_site, self.splits[name]) for name, of_site in found.items()}


def validates(fn: Any) -> bool:
    """Whether a distribution rejects values outside its support: not with ``validate_args=False``."""
    while True:
        if fn.__dict__.get("_validate_args") is False or isinstance(fn, (dist.Delta, dist.Unit)):
            return False
        # A transformed distribution checks for itself: HalfNormal and others switch their base's check off.
        if not hasattr(fn, "base_dist") or isinstance(fn, torch.distributions.TransformedDistribution):
            return True
        fn = fn.base_dist

"""Exact expectations of small programs: sums over all values of all sites, and over all tuples of draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from ...errors import UnsupportedSite
from ..engine.elimination import is_marked
from ..estimators._distributions import finite_support, is_deterministic, score_log_prob

LIMIT = 2**18


class Choose(Messenger):
    """Sets every latent site to one of its values; the first visit of a site appends its other values to the script.

    Args:
        script: the odometer of values, advanced by :func:`advance`.
        limit: the most values of one site.
        among: selects the sites.
        alike: all elements of a site's plates take the same value.

    Attributes:
        scores: log q of the values of each site, element by element.
        names: the sites.
    """

    def __init__(
        self,
        script: list[list[int]],
        limit: int,
        among: Callable[[Any], bool] = lambda msg: True,
        alike: bool = False,
    ):
        super().__init__()
        self.script, self.limit, self.at, self.among, self.alike = script, limit, 0, among, alike
        self.scores: list[Tensor] = []
        self.names: set[str] = set()

    def _pyro_sample(self, msg) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg) or is_deterministic(msg["fn"]):
            return
        if not self.among(msg):
            return
        self.names.add(msg["name"])
        fn = msg["fn"]
        values = finite_support(fn, joint=0 if self.alike else len(fn.batch_shape), limit=self.limit)
        if isinstance(values, str):
            raise UnsupportedSite(msg["name"], "enumerate", values)
        msg["value"] = values[_turn(self.script, self.at, len(values))]
        msg["done"] = True
        self.at += 1
        self.scores.append(score_log_prob(fn, msg["value"]))

    @property
    def log_q(self) -> Tensor:
        """The joint log q of all values, in nats."""
        return sum((score.sum() for score in self.scores), start=torch.zeros(()))


def _turn(script: list[list[int]], at: int, count: int) -> int:
    """The position of the odometer's ``at``-th wheel, which has ``count`` positions."""
    if at == len(script):
        script.append([0, count])
    return script[at][0]


def advance(script: list[list[int]]) -> bool:
    """Advance the odometer to the next values; False after the last."""
    while script and script[-1][0] + 1 == script[-1][1]:
        script.pop()
    if not script:
        return False
    script[-1][0] += 1
    return True


def outcomes(
    model: Callable, guide: Callable, args: tuple = (), kwargs: Mapping[str, Any] | None = None, *, limit: int = LIMIT
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every joint value of the guide's sites as (log q of it, log p(x, z), log q(z)), the last two scaled and masked.

    Sites that the model marks ``infer={"enumerate": "parallel"}`` and the guide lacks are summed out in log p.
    """
    kwargs = kwargs or {}
    script: list[list[int]] = []
    for _ in range(limit):
        with Choose(script, limit) as choose:
            guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        log_p = _summed(poutine.replay(model, trace=guide_trace), set(guide_trace.nodes), args, kwargs, limit)
        yield torch.as_tensor(choose.log_q), log_p, guide_trace.log_prob_sum()
        if not advance(script):
            return
    raise UnsupportedSite("(program)", "enumerate", f"it has more than {limit} joint values")


def _summed(model: Callable, drawn: set[str], args: tuple, kwargs: Mapping[str, Any], limit: int) -> Tensor:
    """log p(x, z), summed over every joint value of the model's enumerated sites that are not ``drawn``."""
    script: list[list[int]] = []
    found = []
    for _ in range(limit):
        choose = Choose(script, limit, lambda msg: msg["name"] not in drawn and is_marked(msg))
        trace = prune_subsample_sites(poutine.trace(choose(model)).get_trace(*args, **kwargs))
        if not choose.names:
            return trace.log_prob_sum()
        for name in trace.nodes:
            if trace.nodes[name]["type"] == "sample" and trace.nodes[name]["scale"] != 1:
                raise UnsupportedSite(name, "enumerate", "it has a scale, and a sum over values of others has none")
        others = trace.log_prob_sum(lambda name, site, listed=choose.names: name not in listed)
        found.append(choose.log_q + others)
        if not advance(script):
            return torch.stack(found).logsumexp(0)
    raise UnsupportedSite("(program)", "enumerate", f"the model enumerates more than {limit} joint values")


def exact_elbo(model: Callable, guide: Callable, *args: Any, limit: int = LIMIT, **kwargs: Any) -> Tensor:
    """The evidence lower bound as a differentiable sum over every joint value of the guide's sites.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Bernoulli(0.25 + 0.5 * z), obs=torch.tensor(1.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Bernoulli(0.75))
    >>> round(exact_elbo(model, guide).exp().item(), 4)  # the guide is the posterior: the evidence itself
    0.5
    """
    terms = [
        log_q.exp() * torch.nan_to_num(p - q, nan=0.0) if log_q > -math.inf else log_q.new_zeros(())
        for log_q, p, q in outcomes(model, guide, args, kwargs, limit=limit)
    ]
    return torch.stack(terms).sum()


def mean_weight(log_weight: Tensor, dim: int) -> Tensor:
    """The logarithm of the mean of importance weights along ``dim``, which is kept with size 1."""
    return log_weight.logsumexp(dim, keepdim=True) - math.log(log_weight.shape[dim])


def exact_iwae(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int,
    limit: int = 2**14,
    bound: Callable[[Tensor, int], Tensor] = mean_weight,
    **kwargs: Any,
):
    """The importance-weighted bound of the whole program as a sum over every tuple of K joint values.

    ``bound(log_weight, dim)`` may be another function of the K log weights along ``dim``.
    """
    listed = [(log_q, p - q) for log_q, p, q in outcomes(model, guide, args, kwargs, limit=limit)]
    if len(listed) ** num_particles > limit:
        raise UnsupportedSite("(program)", "enumerate", f"{len(listed)}^{num_particles} tuples are too many")
    total: Any = 0.0
    for tuple_ in itertools.product(listed, repeat=num_particles):
        log_q = sum(log_q for log_q, _ in tuple_)
        total = total + log_q.exp() * bound(torch.stack([weight for _, weight in tuple_]), 0).squeeze(0)
    return total


@contextmanager
def _scripted(script: list[list[int]], log_weight: list[float], limit: int) -> Iterator[None]:
    """Replace the Bernoulli and categorical samplers by an odometer that records the probability of each draw."""
    at = 0

    def sample(log_probs: Tensor, shape: torch.Size, values: Tensor) -> Tensor:
        nonlocal at
        log_probs = log_probs.detach().expand(*shape, len(values)).reshape(-1, len(values)).double()
        count = len(values) ** len(log_probs)
        if count > limit:
            raise UnsupportedSite("(program)", "enumerate", f"{count} outcomes of one draw are too many to enumerate")
        turn = _turn(script, at, count)
        at += 1
        digits = [turn // len(values) ** i % len(values) for i in range(len(log_probs))]
        picked = torch.tensor(digits, dtype=torch.long)
        log_weight.append(log_probs.gather(1, picked[:, None]).sum().item())
        return values[picked].reshape(shape)

    def bernoulli(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        off = torch.nn.functional.logsigmoid(-self.logits)
        on = torch.nn.functional.logsigmoid(self.logits)
        values = torch.tensor([0.0, 1.0], dtype=self.logits.dtype)
        return sample(torch.stack([off, on], -1), shape, values)

    def categorical(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        return sample(self.logits, shape, torch.arange(self.logits.shape[-1]))

    Bernoulli, Categorical = torch.distributions.Bernoulli, torch.distributions.Categorical
    kept = Bernoulli.sample, Categorical.sample
    try:
        Bernoulli.sample, Categorical.sample = bernoulli, categorical
        yield
    finally:
        Bernoulli.sample, Categorical.sample = kept


def mean_over_draws(function: Callable[[], Tensor], *, limit: int = LIMIT) -> Tensor:
    """E[function()] over every tuple of its Bernoulli and categorical draws.

    With the gradient of an estimator as ``function`` this is its exact mean. Estimators with other draws (uniforms,
    Gumbels) cannot be averaged this way. One call before the enumeration initializes lazy parts.

    >>> import pyro.distributions as dist
    >>> round(mean_over_draws(lambda: dist.Bernoulli(torch.full((2,), 0.25)).sample().sum()).item(), 12)
    0.5
    """
    function()
    script: list[list[int]] = []
    total: Any = 0.0
    for _ in range(limit):
        log_weight: list[float] = []
        with _scripted(script, log_weight, limit):
            result = function()
        weight = math.exp(math.fsum(log_weight))
        if weight > 0:  # impossible outcomes may be NaN
            total = total + weight * result.detach()
        if not advance(script):
            return total
    raise UnsupportedSite("(program)", "enumerate", f"it makes more than {limit} tuples of draws")

"""The log-variance divergence of the guide from the posterior (VarGrad)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import BadInput
from ..engine.records import Run
from ..engine.terms import Layout, summed_to, with_terms
from ._base import Objective, Recorded, objectives
from ._weights import Weights, importance_weights


@objectives.register("log-variance")
class LogVariance(Objective):
    """−½ the sample variance of log q(z) − log p(x, z) over K ≥ 2 detached draws, per datum (Richter et al. 2020).

    "VarGrad: a low-variance gradient estimator for variational inference", arXiv 2010.10436. It is zero if the guide is
    the posterior. With draws of the guide itself its gradient is the leave-one-out score gradient of the ELBO
    (``rloo``); it is a gradient for the guide only. The loss is half the variance in nats², and its value −½ the
    variance is maximized; ``fit`` reports the ELBO of the same draws as ``elbo``.

    Args:
        proposal: a Pyro program with the guide's signature and latent sites that makes the draws; its parameters are
            not trained. None takes the guide.

    Raises:
        BadInput: fewer than two particles; a model with trainable parameters, which needs ``log-variance+elbo``.

    >>> from gumbo.inference import SiteELBO
    >>> SiteELBO(objective="log-variance")
    SiteELBO('default', objective='log-variance', num_particles=None)
    """

    name = "log-variance"
    weighs_rows = True
    sums_over_rows = True
    takes_estimators = False
    min_particles = 2
    learns_model = False

    def __init__(self, proposal: Callable | None = None):
        self.proposal = proposal

    @property
    def reports(self) -> tuple[str, ...]:  # type: ignore[override]
        # Draws of another program do not estimate the guide's ELBO.
        return ("elbo",) if self.proposal is None else ()

    @property
    def gradient_of(self) -> str:  # type: ignore[override]
        return "elbo" if self.proposal is None else self.name

    def value(self, recorded: Recorded) -> Tensor:
        groups, layout = recorded.groups, recorded.layout
        weights = importance_weights(groups, layout)
        if weights.log_p.requires_grad and torch.is_grad_enabled() and not self.learns_model:
            raise BadInput(
                f"objective {self.name!r} trains the guide only, and the model has parameters to learn"
                f"{_named(groups)}: freeze them (requires_grad_(False)), or take objective='log-variance+elbo', which"
                " gives them the ELBO's gradient"
            )
        log_p, log_q = torch.broadcast_tensors(weights.log_p, weights.log_q)
        scale, dim, count = weights.scale, -layout.room, layout.num_particles
        offset = (log_q - log_p).detach()
        if offset.shape[dim] == 1:  # without draws all particles are equal
            offset = offset.expand(*offset.shape[:dim], count, *offset.shape[offset.dim() + dim + 1 :])
        middle = offset.mean(dim, keepdim=True)
        if self.reports:
            recorded.report("elbo", layout.whole(-(scale * middle).sum()))
        # The derivative of ½ the variance. A masked draw has no log q, but later terms may depend on it.
        score = log_q if self.proposal is not None else _score(groups, layout, weights)
        value = -(scale * offset.var(dim, keepdim=True) / 2).sum()
        terms = [-(scale * (offset - middle) / (count - 1) * score).sum()]
        if self.learns_model:
            terms.append((scale * log_p.mean(dim, keepdim=True)).sum())
        return with_terms(value, terms)


@objectives.register("log-variance+elbo")
class LogVarianceWithEvidence(LogVariance):
    """``log-variance`` for the guide, and the ELBO's gradient at the same draws for the model's parameters.

    >>> LogVarianceWithEvidence().name
    'log-variance+elbo'
    """

    name = "log-variance+elbo"
    learns_model = True

    def __init__(self):
        super().__init__(None)

    @property
    def options(self) -> dict[str, object]:
        return {}


def _score(groups: list[list[Run]], layout: Layout, weights: Weights) -> Tensor:
    """The log-probability of each particle's draws, unscaled and unmasked, per element of the plates of the weights."""

    def gather(run: Run) -> Tensor:
        terms = [(s.log_prob / weights.scale if s.score is None else s.score, s.frames) for s in run.guide]
        return sum((summed_to(term, own, weights.frames) for term, own in terms), start=torch.zeros(()))

    return layout.join([gather(run) for paths in groups for run in paths])


def _named(groups: list[list[Run]]) -> str:
    """One of the model's parameters, for a message."""
    names = [name for name, value in groups[0][0].model_params.items() if value.requires_grad]
    return f" ({names[0].replace('$$$', '.')!r})" if names else ""

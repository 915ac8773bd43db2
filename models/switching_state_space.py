"""State space models whose linear dynamics switch between regimes, which are summed out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ._base import Latent, models
from ._sequences import Padded, SequenceModel, standard_where_masked


@models.register("switching-state-space")
class SwitchingStateSpace(SequenceModel):
    r"""A chain of discrete regimes, each with its own linear dynamics of a Normal state and its own emission.

    .. math:: s_t \mid s_{t-1} \sim \mathrm{Categorical}(\mathrm{softmax}\,P_{s_{t-1}}), \qquad
              z_t \mid z_{t-1}, s_t \sim N(A_{s_t} z_{t-1} + b_{s_t}, \mathrm{diag}\,q_{s_t}^2), \qquad
              x_t \mid z_t, s_t \sim N(C_{s_t} z_t + d_{s_t}, \mathrm{diag}\,r_{s_t}^2), \qquad t = 1 \dots T

    Guides draw the states z and not the regimes s: the model marks those for enumeration, and every ELBO sums them out
    in time linear in T, so that given the states the likelihood is exact; `to_arviz` draws them from their exact
    conditional. z_0 is a parameter. With another ``likelihood``, a word of `gumbo.models.likelihoods`, C z + d is what
    a decoder would give it; the option ``sd`` of ``normal`` fixes r.

    Sequences of different lengths are padded with zeros: ``mask`` has ones for the valid steps. A masked step has a
    N(0, I) state, as in the guide ``combiner``, and its data have no effect, so that it adds nothing to any bound.
    Called as ``model(x, mask=mask)``. Shapes: ``x`` is ``(B, T, D)`` or ``(B, 1, T, D)``, ``mask`` ``(B, T)``; sites
    ``s1`` ... ``sT`` are integers ``(B,)``, sites ``z1`` ... ``zT`` ``(B, latent_dim)``, sites ``x1`` ... ``xT``
    ``(B, D)``. ``inputs(x, lengths)`` makes the mask; ``per_step(values, mask)`` turns nats per sequence into nats per
    step. Raises BadInput for data or masks of another shape and, under validation, for masks that are no run of ones
    from the first step on, and for data outside the likelihood's support.

    Args:
        data_shape: ``(T, D)`` or ``(1, T, D)``.
        num_regimes: number of regimes.
        latent_dim: size of z_t.
        min_sd: smallest standard deviation, added to the softplus of an output.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Ghahramani & Hinton 2000, "Variational learning for switching state-space models"; Linderman et al. 2017,
    arXiv:1610.08466.

    >>> from gumbo.guides import CombinerGuide
    >>> from gumbo.inference import SiteELBO
    >>> model = SwitchingStateSpace(data_shape=(6, 4), num_regimes=3, latent_dim=2)
    >>> given = model.example(5)
    >>> SiteELBO("pathwise")(model, CombinerGuide(model, rnn_hidden=8))(**given).isfinite()
    tensor(True)
    >>> bool((given["x"][0, 1:] == 0).all())  # after its end a sequence is silent
    True
    """

    variants = ({"num_regimes": 3, "latent_dim": 2},)

    def __init__(
        self,
        data_shape: Sequence[int],
        num_regimes: int = 4,
        latent_dim: int = 4,
        min_sd: float = 1e-2,
        likelihood: str = "normal",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.min_sd = min_sd
        places = range(1, self.steps + 1)
        self.latents = {f"z{t}": Latent("normal", (latent_dim,)) for t in places}
        self.summed = tuple(f"s{t}" for t in places)
        self.observed = tuple(f"x{t}" for t in places)
        outputs = self.observe_by(likelihood, likelihood_options, (self.width,))
        self.learns_sd = likelihood == "normal" and "sd" not in (likelihood_options or {})
        one = math.log(math.expm1(1.0))  # softplus of it is 1
        regimes = torch.Size((num_regimes,))
        # Initially regimes tend to persist and states to decay, and small differences break the regimes' symmetry.
        self.decoder_first = nn.Parameter(torch.zeros(regimes))
        self.decoder_transition = nn.Parameter(2 * torch.eye(num_regimes))
        self.decoder_start = nn.Parameter(torch.zeros(latent_dim))
        self.decoder_dynamics = nn.Parameter(
            0.9 * torch.eye(latent_dim) + 0.1 * torch.randn(*regimes, latent_dim, latent_dim)
        )
        self.decoder_drift = nn.Parameter(0.1 * torch.randn(*regimes, latent_dim))
        self.decoder_noise = nn.Parameter(torch.full((*regimes, latent_dim), one))
        loading = torch.randn(outputs, latent_dim) / math.sqrt(latent_dim)
        self.decoder_loading = nn.Parameter(loading + 0.1 * torch.randn(*regimes, outputs, latent_dim))
        self.decoder_offset = nn.Parameter(0.1 * torch.randn(*regimes, outputs))
        self.decoder_spread = nn.Parameter(torch.full((*regimes, self.width), one)) if self.learns_sd else None

    def forward(self, x: Tensor | None = None, *, mask: Tensor | None = None, batch_size: int = 1) -> Tensor:
        with self.data_plate(x, batch_size):
            mask = self.checked_mask(mask, x, batch_size)
            rows = None if x is None else x.flatten(1, -2)
            regime, z, drawn = None, self.decoder_start, []
            for t in pyro.markov(range(1, self.steps + 1)):
                here = mask[:, t - 1]
                logits = self.decoder_first if regime is None else self.decoder_transition[regime]
                regime = pyro.sample(f"s{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                z = pyro.sample(f"z{t}", self.dynamics(regime, z, here))
                seen = None if rows is None else rows[:, t - 1]
                drawn.append(pyro.sample(f"x{t}", self.emission(regime, z, here), obs=seen))
        return torch.stack(drawn, -2).unflatten(-2, self.data_shape[:-1])

    def dynamics(self, regime: Tensor, before: Tensor, mask: Tensor) -> dist.TorchDistribution:
        """p(z_t) at regimes ``(...)`` after states ``(..., Z)``, batch shape ``(...)``."""
        loc = (self.decoder_dynamics[regime] @ before.unsqueeze(-1)).squeeze(-1) + self.decoder_drift[regime]
        return standard_where_masked(loc, softplus(self.decoder_noise[regime]) + self.min_sd, mask)

    def emission(self, regime: Tensor, z: Tensor, mask: Tensor) -> dist.TorchDistribution:
        """p(x_t) at regimes ``(...)`` and states ``(..., Z)``, batch shape ``(...)``."""
        output = (self.decoder_loading[regime] @ z.unsqueeze(-1)).squeeze(-1) + self.decoder_offset[regime]
        if self.decoder_spread is None:
            return Padded(self.observation(output), mask > 0)
        fn = dist.Normal(output, softplus(self.decoder_spread[regime]) + self.min_sd)
        return Padded(fn.to_event(1), mask > 0)

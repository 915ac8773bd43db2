"""Sequences whose hidden state is a chain of Normals."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._chains import GatedTransition, NormalChain
from ._networks import mlp

SILENT = -100.0  # the logit of what a step that does not count shows: probability e^-100


@models.register("deep-markov-model")
class DeepMarkovModel(GenerativeModel):
    r"""A chain of Normal latents under a sequence of binary vectors, such as chords.

    .. math:: z_t \mid z_{t-1} \sim N(\mu(z_{t-1}), \mathrm{diag}\,\sigma(z_{t-1})^2), \qquad
              x_t \mid z_t \sim \prod_i \mathrm{Bernoulli}(x_{ti}; \sigma(f(z_t)_i)), \qquad t = 1 \dots T

    μ and σ are a gated transition; what stands before z_1 is a parameter. Sequences of several lengths are padded with
    zeros: ``mask`` has ones for the steps that count. A step that does not count shows zeros and is N(0, I), in the
    model and in the guide ``combiner``, so that it adds nothing to any bound.

    Called as ``model(x, mask=mask)``, and so are its guides. Shapes: ``x`` is ``(B, T, D)`` or ``(B, 1, T, D)`` (a
    ``data_shape`` of two or three sizes), ``mask`` ``(B, T)``, site ``z``, of all steps, ``(B, T, latent_dim)``.
    ``inputs(x, lengths)`` makes the mask; ``per_step(values, mask)`` turns nats per sequence into nats per step. Raises
    BadInput for data or masks of another shape and, under validation, for masks that are no run of ones from the first
    step on, for NaN or for values other than 0 and 1.

    Krishnan, Shalit & Sontag 2017, "Structured inference networks for nonlinear state space models", arXiv:1609.09869.

    >>> model = DeepMarkovModel(data_shape=(6, 4), latent_dim=2, hidden=(8,), transition_hidden=8)
    >>> draws = model.sample_prior(3, mask=model.mask_of(torch.tensor([6, 2, 1])))
    >>> {site: tuple(value.shape) for site, value in draws.items()}
    {'z': (3, 6, 2), 'x': (3, 6, 4)}
    >>> bool((draws["x"][1, 2:] == 0).all())  # after its end a sequence is silent
    True
    """

    variants = ({"latent_dim": 2, "hidden": (6,), "transition_hidden": 5},)
    binary_data = True

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int = 100,
        hidden: Sequence[int] = (100, 100),
        transition_hidden: int = 200,
        min_sd: float = 1e-3,
        activation: str = "relu",
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if len(self.data_shape) not in (2, 3) or (len(self.data_shape) == 3 and self.data_shape[0] != 1):
            raise BadInput(f"DeepMarkovModel: data_shape {tuple(data_shape)} must be (T, D) or (1, T, D)")
        self.steps, width = self.data_shape[-2:]
        self.latents = {"z": Latent("normal", (self.steps, latent_dim))}
        self.conditions = {"mask": (self.steps,)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.decoder = mlp([latent_dim, *reversed(hidden), width], activation)
        self.decoder_transition = GatedTransition(latent_dim, transition_hidden, min_sd)
        self.decoder_start = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor | None = None, *, mask: Tensor | None = None, batch_size: int = 1) -> Tensor:
        with self.data_plate(x, batch_size):
            (mask,) = self.check_conditions({"mask": mask}, batch_size if x is None else len(x))
            # Taken here and not when z is scored, so that Pyro sees the parameters within the program.
            transition = self.decoder_transition
            z = pyro.sample("z", NormalChain(lambda previous, t: transition(previous), self.decoder_start, mask))
            return pyro.sample("x", self.likelihood(z, mask), obs=x)

    def likelihood(self, z: Tensor, mask: Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., B, T, Z)`` and ``mask`` ``(B, T)``, batch shape ``(..., B)``."""
        logits = self.decoder(z)
        logits = torch.where(mask.unsqueeze(-1) > 0, logits, torch.full_like(logits, SILENT))
        return dist.Bernoulli(logits=logits.unflatten(-2, self.data_shape[:-1])).to_event(len(self.data_shape))

    def check_conditions(self, given, rows):
        (mask,) = super().check_conditions(given, rows)
        if is_validation_enabled() and not (((mask == 0) | (mask == 1)).all() and (mask.diff(dim=-1) <= 0).all()):
            raise BadInput("DeepMarkovModel: mask must be ones from the first step to a sequence's last, then zeros")
        return [mask]

    def mask_of(self, lengths: Tensor) -> Tensor:
        """The mask ``(B, T)`` of sequences of those lengths ``(B,)``."""
        if lengths.min() < 1 or lengths.max() > self.steps:
            found = f"{lengths.min().item()} to {lengths.max().item()}"
            raise BadInput(f"DeepMarkovModel: lengths are {found}, expected 1 to {self.steps}: give them as labels")
        like = self.decoder_start
        return (torch.arange(self.steps, device=lengths.device) < lengths.unsqueeze(-1)).to(like.dtype)

    def inputs(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Sequences as ``x``, and the mask of their lengths, which stand as labels; without labels all steps count."""
        if labels is None:
            labels = torch.full((len(images),), self.steps, device=images.device)
        return {"x": images, "mask": self.mask_of(labels).to(images.dtype)}

    def example(self, rows: int = 2) -> dict[str, Tensor]:
        mask = self.mask_of(1 + torch.arange(rows, device=self.decoder_start.device) % self.steps)
        return {"mask": mask, "x": self.sample_prior(rows, mask=mask)["x"]}

    @staticmethod
    def per_step(values: Tensor, mask: Tensor) -> float:
        """Nats per time step, over all sequences together, of numbers for each sequence ``(N,)``.

        >>> DeepMarkovModel.per_step(torch.tensor([-6.0, -2.0]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
        -2.0
        """
        return (values.sum() / mask.sum()).item()

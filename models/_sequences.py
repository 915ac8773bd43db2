"""Common parts of sequence models: padding, masks, lengths, nats per time step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from ..errors import BadInput
from ._base import GenerativeModel

SILENT = -100.0  # the logit of a one at a masked step: probability e^-100


def silent_where_masked(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits ``(..., D)`` of binary vectors, with zeros almost surely where ``mask`` ``(...)`` is zero."""
    return torch.where(mask.unsqueeze(-1) > 0, logits, torch.full_like(logits, SILENT))


def standard_where_masked(loc: Tensor, scale: Tensor, mask: Tensor) -> dist.TorchDistribution:
    """The Normal of vectors with these ``(..., Z)``, but N(0, I) where ``mask`` ``(...)`` is zero."""
    counts = mask.unsqueeze(-1) > 0
    loc, scale = torch.where(counts, loc, torch.zeros_like(loc)), torch.where(counts, scale, torch.ones_like(scale))
    return dist.Normal(loc, scale).to_event(1)


class Padded(MaskedDistribution):
    """A distribution of vectors under a mask, whose draws are zeros where they are masked.

    >>> noise = Padded(dist.Normal(torch.zeros(2, 3), 1.0).to_event(1), torch.tensor([True, False]))
    >>> noise.sample()[1], noise.log_prob(torch.ones(2, 3))[1]
    (tensor([0., 0., 0.]), tensor(0.))
    """

    def _kept(self, value: Tensor) -> Tensor:
        counts = torch.as_tensor(self._mask)
        counts = counts.reshape(counts.shape + (1,) * self.event_dim)
        return torch.where(counts, value, torch.zeros_like(value))

    def sample(self, sample_shape=()):
        return self._kept(super().sample(sample_shape))

    def rsample(self, sample_shape=()):
        return self._kept(super().rsample(sample_shape))


class SequenceModel(GenerativeModel):
    """Base of models of sequences ``(B, T, D)`` or ``(B, 1, T, D)``, padded with zeros where ``mask`` ``(B, T)`` is."""

    def __init__(self, data_shape: Sequence[int], data_size: int | None = None):
        super().__init__(data_shape, data_size)
        if len(self.data_shape) not in (2, 3) or (len(self.data_shape) == 3 and self.data_shape[0] != 1):
            raise BadInput(f"{type(self).__name__}: data_shape {tuple(data_shape)} must be (T, D) or (1, T, D)")
        self.steps, self.width = self.data_shape[-2:]
        self.conditions = {"mask": (self.steps,)}

    def check_conditions(self, given, rows):
        (mask,) = super().check_conditions(given, rows)
        if is_validation_enabled() and not (((mask == 0) | (mask == 1)).all() and (mask.diff(dim=-1) <= 0).all()):
            raise BadInput(
                f"{type(self).__name__}: mask must be ones from the first step to a sequence's last, then zeros"
            )
        return [mask]

    def checked_mask(self, mask: Tensor | None, x: Tensor | None, batch_size: int) -> Tensor:
        """The mask of a batch; raises BadInput for another shape and, under validation, for ones at masked steps."""
        (mask,) = self.check_conditions({"mask": mask}, batch_size if x is None else len(x))
        if x is not None and is_validation_enabled():
            self._check_padding(x, mask)
        return mask

    def _check_padding(self, x: Tensor, mask: Tensor) -> None:
        """Binary data at masked steps must be zeros, which have log-probability 0 there; other data are not read."""
        if self.binary_data and x.reshape(len(x), self.steps, self.width)[mask == 0].any():
            raise BadInput(
                f"{type(self).__name__}: x holds ones at masked steps: pad the sequences with zeros, or give their true"
                " lengths"
            )

    def mask_of(self, lengths: Tensor) -> Tensor:
        """The mask ``(B, T)`` of sequences of those lengths ``(B,)``."""
        if lengths.min() < 1 or lengths.max() > self.steps:
            found = f"{lengths.min().item()} to {lengths.max().item()}"
            raise BadInput(
                f"{type(self).__name__}: lengths are {found}, expected 1 to {self.steps}: give them as labels"
            )
        dtype = next(self.parameters()).dtype
        return (torch.arange(self.steps, device=lengths.device) < lengths.unsqueeze(-1)).to(dtype)

    def inputs(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Sequences as ``x``, and the mask of their lengths, which are the labels; without labels no step is masked."""
        if labels is None:
            labels = torch.full((len(images),), self.steps, device=images.device)
        mask = self.mask_of(labels).to(images.dtype)
        self._check_padding(images, mask)
        return {"x": images, "mask": mask}

    def example(self, rows: int = 2) -> dict[str, Tensor]:
        mask = self.mask_of(1 + torch.arange(rows, device=next(self.parameters()).device) % self.steps)
        return {"mask": mask, "x": self.joined(self.sample_prior(rows, mask=mask))}

    def joined(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Sequences ``(B, *data_shape)`` from the draws of `sample_prior`."""
        if self.observed == ("x",):
            return draws["x"]
        return torch.stack([draws[name] for name in self.observed], -2).unflatten(-2, self.data_shape[:-1])

    @staticmethod
    def per_step(values: Tensor, mask: Tensor) -> float:
        """Nats per time step, over all sequences together, of numbers for each sequence ``(N,)``.

        >>> SequenceModel.per_step(torch.tensor([-6.0, -2.0]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
        -2.0
        """
        return (values.sum() / mask.sum()).item()

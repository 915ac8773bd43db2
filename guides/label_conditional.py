"""The guide of semi-supervised models: a classifier, and a latent given the label."""

from __future__ import annotations

import pyro
import torch
from torch.nn.functional import cross_entropy

from ..models._base import GenerativeModel
from ..models.semi_supervised_vae import one_hot_labels
from ._base import guides
from .layered import LayeredGuide


@guides.register("label-conditional")
class LabelConditionalGuide(LayeredGuide):
    r"""The posterior of M2: :math:`q(y, z \mid x) = q(y \mid x)\, q(z \mid x, y)`, the label drawn or given.

    ``guide(x)`` draws the label, ``guide(x, y=labels)`` takes it as observed, like the model. q(y | x) is a classifier:
    ``classify`` returns its logits, and ``classification_loss`` its cross-entropy, to add to the bound of the labelled
    data, since that bound alone does not train it. Otherwise it is a layered guide, with its arguments.

    Shapes: ``x`` is ``(B, *data_shape)``, labels are integers ``(B,)`` or one-hot vectors. Raises BadInput for a model
    without labels and for labels of another shape.

    Args:
        model: the model, whose latents and data shape the guide takes.
        parents: sites that each site depends on; None takes the model's recommendation.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        site_hidden: widths of the hidden layers of each site's network.
        activation: activation of the guide's networks; None mirrors the model's decoder.
        skip: whether sites with parents see features of x too.
        min_sd: smallest standard deviation, added to the softplus of an output.
        temperature: initial temperature of relaxed sites.

    Kingma et al. 2014, arXiv:1406.5298.

    >>> import torch
    >>> from gumbo.models import SemiSupervisedVAE
    >>> model = SemiSupervisedVAE((1, 8, 8), num_classes=10, latent_dim=2, hidden=(16,))
    >>> guide, x = LabelConditionalGuide(model), torch.zeros(3, 1, 8, 8)
    >>> guide(x, y=torch.tensor([7, 2, 1]))["y"].argmax(-1)
    tensor([7, 2, 1])
    >>> guide.classify(x).shape
    torch.Size([3, 10])
    """

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if model.label_site is None:
            return "none of its latents is a label"
        return super().why_not(model)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, **conditions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            features = self.features(x, conditions)
            values = {} if y is None else {self.label_site: self._one_hot(y, x)}
            for site in self.parents:
                if site not in values:
                    values[site] = pyro.sample(site, self.factor(site, features, values))
        return values

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of q(y | x), normalized, ``(B, num_classes)``."""
        return self.factor(self.label_site, self.features(x, {}), {}).logits

    def classification_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The cross-entropy −log q(y | x), in nats, averaged over the batch."""
        return cross_entropy(self.classify(x), self._one_hot(y, x))

    def _one_hot(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return one_hot_labels(y, self.latents[self.label_site].size, x, type(self).__name__)

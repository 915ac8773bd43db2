"""Guides with dependent latents, along a directed acyclic graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
import torch
from torch import nn

from ..errors import BadInput
from ..models._base import GenerativeModel
from ..models._networks import beside_each_other, mlp
from ..models.families import MIN_SD, TEMPERATURE, distribution, families, num_outputs
from ._base import Guide, guides


@guides.register("layered")
class LayeredGuide(Guide):
    r"""A posterior that factorizes over a graph: :math:`q(z \mid x) = \prod_j q(z_j \mid \mathrm{Pa}(z_j), x)`.

    Latents may be of mixed families. Without ``parents`` and a recommendation of the model every site depends on all
    earlier sites of the model. Each factor is its family's distribution (diagonal Normal, categorical, ...) with its
    own network, of ``site_hidden`` layers, whose inputs are features of x and the parents' values; ``skip=False``
    passes x only to sites without parents, as in the classical q(z1 | x) q(z2 | z1).

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)`` as the model declares it. Raises BadInput for
    parents that are no latents or that form a cycle, and for a model with a single latent.

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

    Mnih & Gregor 2014, arXiv:1402.0030; Webb et al. 2018, arXiv:1712.00287, on which parents make the posterior
    faithful.

    >>> import torch
    >>> from gumbo.models import SigmoidBeliefNetwork
    >>> model = SigmoidBeliefNetwork((1, 8, 8), layers=(6, 5))
    >>> guide = LayeredGuide(model)
    >>> guide.parents
    {'z1': (), 'z2': ('z1',)}
    >>> {site: tuple(draw.shape) for site, draw in guide(torch.zeros(3, 1, 8, 8)).items()}
    {'z1': (3, 6), 'z2': (3, 5)}
    """

    families = families

    def __init__(
        self,
        model: GenerativeModel,
        parents: Mapping[str, Sequence[str]] | None = None,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        site_hidden: Sequence[int] = (),
        activation: str | None = None,
        skip: bool = True,
        min_sd: float = MIN_SD,
        temperature: float = TEMPERATURE,
    ):
        super().__init__(model, hidden, channels, activation)
        self.parents = in_order(self.latents, parents if parents is not None else default_parents(model))
        self.skip, self.min_sd = skip, min_sd
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.encoder_sites = nn.ModuleDict()
        for site, above in self.parents.items():
            inputs = sum(self.latents[name].size for name in above)
            inputs += self.encoder.size if self._sees_data(site) else 0
            sizes = [inputs, *site_hidden, num_outputs(self.latents[site])]
            self.encoder_sites[site] = mlp(sizes, self.layout["activation"])

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if len(model.latents) < 2:
            return "it has a single latent, so there is no dependence to model"
        return super().why_not(model)

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            features = self.features(x, conditions)
            values: dict[str, torch.Tensor] = {}
            for site in self.parents:
                values[site] = pyro.sample(site, self.factor(site, features, values))
        return values

    def factor(self, site: str, features: torch.Tensor, values: Mapping[str, torch.Tensor]):
        """q of one site given features ``(B, encoder.size)`` and the values of (at least) its parents."""
        latent = self.latents[site]
        inputs = [values[name].flatten(-len(self.latents[name].shape)) for name in self.parents[site]]
        if self._sees_data(site):
            inputs.append(features)
        output = self.encoder_sites[site](beside_each_other(inputs))
        return distribution(latent, output, min_sd=self.min_sd, temperature=self.temperature)

    def _sees_data(self, site: str) -> bool:
        return self.skip or not self.parents[site]


def default_parents(model: GenerativeModel) -> Mapping[str, Sequence[str]]:
    """The model's recommendation, or else all earlier sites in the model's order."""
    if model.guide_parents is not None:
        return model.guide_parents
    sites = list(model.latents)
    return {site: tuple(sites[:place]) for place, site in enumerate(sites)}


def in_order(sites: Sequence[str], parents: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The parents of every site, each site after its parents; raises BadInput for an unknown site or a cycle.

    >>> in_order(["a", "b"], {"a": ["b"]})
    {'b': (), 'a': ('b',)}
    """
    for name in [*parents, *(above for names in parents.values() for above in names)]:
        if name not in sites:
            raise BadInput(f"parents name {name!r}, which is no latent of the model (latents: {', '.join(sites)})")
    waiting, ordered = list(sites), {}
    while waiting:
        ready = [site for site in waiting if all(above in ordered for above in parents.get(site, ()))]
        if not ready:
            raise BadInput(f"parents form a cycle among {', '.join(waiting)}")
        ordered |= {site: tuple(parents.get(site, ())) for site in ready}
        waiting = [site for site in waiting if site not in ready]
    return ordered

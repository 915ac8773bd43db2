"""The interface of guides, and their registry."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from ..errors import BadInput
from ..models._base import GenerativeModel, Latent, OverData
from ..models._networks import Trunk
from ..models.families import distribution, num_outputs
from ..registry import Registry, is_librarys, takes


def _expected(found: Any) -> str:
    kind = (inspect.isfunction(found) and takes(found, 1, only=False)) or (
        isinstance(found, type) and issubclass(found, nn.Module)
    )
    if kind and not is_librarys(found):
        return ""
    return "a subclass of Guide, or another class of modules or a function of the model that makes one"


guides: Registry[type[AnyGuide]] = Registry("guide", _expected)


class AnyGuide(OverData):
    """Base of all guides: takes its shapes from the latents that the model declares, and refuses unsupported ones.

    ``guide(x)`` is the Pyro program: it samples each declared latent under the model's name, in the model's plate, and
    returns them as a dict. ``families`` are the supported latent families. ``auxiliary`` names further sites that it
    samples and the model does not have; ``local`` says whether its latents are per datum or shared by all data.

    ``factorized = True`` declares that the sites and their distributions depend on the arguments and the parameters
    alone, and not on other draws. An estimator that evaluates other draws then repeats the sample statements without
    the networks. A subclass with a ``forward`` of its own declares it again. docs/extending.md has an example.

    Args:
        model: the model, whose latents and data shape the guide takes.
    """

    families: ClassVar[Collection[str]] = ()
    local: ClassVar[bool] = True
    factorized: ClassVar[bool] = False
    auxiliary: tuple[str, ...] = ()
    _not_in_config = _unchecked = ("model",)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "forward" in vars(cls) and "factorized" not in vars(cls):
            cls.factorized = False

    def __init__(self, model: GenerativeModel):
        if not isinstance(model, GenerativeModel):
            raise BadInput(f"{type(self).__name__} needs a GenerativeModel, not {type(model).__name__}")
        if reason := self.why_not(model):
            fit = ", ".join(fitting(model)) or "none of the registered ones"
            raise BadInput(
                f"{type(self).__name__} cannot serve {type(model).__name__}: {reason}; guides that fit: {fit}"
            )
        super().__init__(model.data_shape, model.data_size)
        self.latents: dict[str, Latent] = dict(model.latents)
        self.conditions = dict(model.conditions)
        self.label_site = model.label_site

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        """Why this guide does not support ``model``, as a phrase; an empty string if it does."""
        if not model.latents:
            return "it has no latents"
        for site, latent in model.latents.items():
            if latent.local != cls.local:
                each = ("one for all data", "one for each datum")
                return f"its latent {site!r} is {each[latent.local]}, and the guide draws {each[cls.local]}"
            if latent.family not in cls.families:
                return f"its latent {site!r} is {latent.family}, and the guide serves {' and '.join(cls.families)}"
        return ""

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        raise TypeError(f"{type(self).__name__} must define forward(x)")


class Guide(AnyGuide):
    """Base of the amortized guides q(z | x): ``encoder`` computes features of the data, and of the conditions if any.

    A subclass defines ``forward``, which samples the sites from ``features(x, conditions)``, ``(B, encoder.size)``;
    docs/extending.md has an example.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.
    """

    def __init__(
        self,
        model: GenerativeModel,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
    ):
        super().__init__(model)
        asked = {"hidden": hidden, "channels": channels, "activation": activation}
        self.layout = {name: model.mirror[name] if value is None else value for name, value in asked.items()}
        self.layout["inputs"] = model.mirror.get("inputs", "identity")
        self.encoder = Trunk(self.data_shape, **self.layout, extra=sum(map(math.prod, self.conditions.values())))

    def features(self, x: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """The encoder's features of a batch and its conditions, ``(B, encoder.size)``."""
        if not isinstance(x, torch.Tensor):
            raise BadInput(f"{type(self).__name__}: x is {type(x).__name__}, expected a tensor of data")
        return self.encoder(x, *self.check_conditions(conditions, len(x)))


def fitting(model: GenerativeModel) -> list[str]:
    """The names of the registered guides that support ``model``.

    Args:
        model: a model of the collection, or another `GenerativeModel`.

    Returns:
        The names, in the registry's order.

    Raises:
        AttributeError: an object that is no `GenerativeModel`.

    >>> from gumbo.models import CategoricalVAE
    >>> fitting(CategoricalVAE((1, 8, 8), hidden=(8,), relaxed=True))
    ['relaxed-categorical', 'unconditional']
    """
    return [name for name, guide in guides.items() if not guide.why_not(model)]


class FactorizedGuide(Guide):
    r"""Base of the guides :math:`q(z \mid x) = \prod_j q(z_j \mid x)`: an encoder, and a linear head for each site.

    A subclass may set the number of outputs of a site (``num_outputs``) and their distribution (``distribution``); the
    defaults are the family's own.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.
    """

    factorized = True

    def __init__(
        self,
        model: GenerativeModel,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
    ):
        super().__init__(model, hidden, channels, activation)
        self.encoder_heads = nn.ModuleDict(
            {site: nn.Linear(self.encoder.size, self.num_outputs(latent)) for site, latent in self.latents.items()}
        )

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            features = self.features(x, conditions)
            return {
                site: pyro.sample(site, self.distribution(latent, self.encoder_heads[site](features)))
                for site, latent in self.latents.items()
            }

    def num_outputs(self, latent: Latent) -> int:
        """The number of outputs of a site's head."""
        return num_outputs(latent)

    def distribution(self, latent: Latent, output: torch.Tensor) -> TorchDistribution:
        """q of one site from its head's ``output`` ``(B, num_outputs)``; its event shape is ``latent.shape``."""
        return distribution(latent, output)

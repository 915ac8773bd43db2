"""The interface of generative models, and their registry."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import is_validation_enabled

from ..errors import BadInput, first_line
from ..options import ConstructorSignature, check_options
from ..registry import Registry
from .families import Latent
from .likelihoods import Observation


def _expected(found: Any) -> str:
    return "" if isinstance(found, type) and issubclass(found, GenerativeModel) else "a subclass of GenerativeModel"


models: Registry[type[GenerativeModel]] = Registry("model", _expected)


class Configured(PyroModule):
    """A PyroModule that stores its constructor arguments, defaults included, in the dict ``config``.

    ``type(module)(**module.config)`` builds a copy (for a guide: ``type(guide)(model, **guide.config)``).
    """

    config: dict[str, Any]
    _not_in_config: ClassVar[tuple[str, ...]] = ()
    # No handler within listens to the parameters of its networks, so that a loss need not mention each at every step.
    plain_networks: ClassVar[bool] = True
    __signature__ = ConstructorSignature()

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        arguments = check_options(cls, args, kwargs)
        config = {name: _plain(value) for name, value in arguments.items() if name not in cls._not_in_config}
        object.__setattr__(self, "config", config)
        return self

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _within_memory(cls.__init__)


def _within_memory(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, with a one-line error for sizes beyond the memory."""

    @functools.wraps(init)
    def made(self, *args, **kwargs) -> None:
        try:
            init(self, *args, **kwargs)
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise BadInput(f"{type(self).__name__} cannot be made of these options: {first_line(error)}") from error

    return made


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | torch.Size) else value


class OverData(Configured):
    """Common base of models and guides: the shape of a datum, the checks of a batch, and the data plate.

    ``conditions`` are the keywords of a conditional program besides ``x``, with the shape of one datum each.

    ``data_size`` is the size of the whole data set: if it is given, a batch counts as a subsample of it, and Pyro
    scales every log-probability by ``data_size / B``, in the model and in guides built from it.
    """

    def __init__(self, data_shape: Sequence[int], data_size: int | None = None):
        super().__init__()
        self.data_shape = torch.Size(data_shape)
        self.data_size = data_size
        if min(self.data_shape, default=1) < 1:
            raise BadInput(f"{type(self).__name__}: data_shape {tuple(data_shape)} must hold positive sizes")

    _ranges: ClassVar[Mapping[str, float]] = MappingProxyType({"min_sd": 0, "data_shape": -math.inf})
    conditions: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    x_is_given: bool = False

    def data_plate(self, x: torch.Tensor | None, batch_size: int = 1):
        """The plate ``data`` over the rows of ``x``, or over ``batch_size`` rows without ``x``."""
        if x is None and self.x_is_given:
            raise BadInput(f"{type(self).__name__} says what follows from x, and nothing of x itself: give it x")
        like = self._like()
        if x is None:
            return pyro.plate("data", batch_size, dim=-1, device=str(like.device))
        self.check_batch(x, like)
        if self.data_size is None:
            return pyro.plate("data", len(x), dim=-1, device=str(x.device))
        if len(x) > self.data_size:
            raise BadInput(f"{type(self).__name__}: a batch of {len(x)} is larger than data_size={self.data_size}")
        rows = torch.arange(len(x), device=x.device)
        return pyro.plate("data", self.data_size, subsample=rows, dim=-1, device=str(x.device))

    def _like(self) -> torch.Tensor:
        """The first parameter or buffer, which has the device and dtype of all; ``parameters()`` takes longer."""
        found = _first_parameter(self)
        return next(self.buffers(), torch.empty(())) if found is None else found

    def check_batch(self, x: torch.Tensor, like: torch.Tensor) -> None:
        """Raise BadInput unless ``x`` is a batch ``(B, *data_shape)`` of the module's dtype."""
        who, expected = type(self).__name__, f"(B, {', '.join(map(str, self.data_shape))})"
        if not isinstance(x, torch.Tensor):
            raise BadInput(f"{who}: x is {type(x).__name__}, expected a tensor of shape {expected}")
        if x.shape[1:] != self.data_shape or x.dim() == 0:
            raise BadInput(f"{who}: x has shape {tuple(x.shape)}, expected {expected}")
        if len(x) == 0:
            raise BadInput(f"{who}: x is an empty batch, expected {expected} with B of at least 1")
        if x.dtype != like.dtype:
            raise BadInput(
                f"{who}: x is {x.dtype}, expected {like.dtype} as its parameters are: call x.to({like.dtype})"
            )
        if is_validation_enabled():
            self.check_values(x)

    def check_conditions(self, given: Mapping[str, torch.Tensor | None], rows: int) -> list[torch.Tensor]:
        """The conditions in their order; raises BadInput for one that is missing, unknown or of a wrong shape."""
        who, known = type(self).__name__, ", ".join(f"{name}=" for name in self.conditions) or "none"
        for name in given:
            if name not in self.conditions:
                raise BadInput(f"{who} takes no keyword {name!r} beside x (it takes {known})")
        for name, shape in self.conditions.items():
            if given.get(name) is None:
                raise BadInput(f"{who} needs {name}=, a tensor of shape {(rows, *shape)}")
            self.check_shape(name, given[name], (rows, *shape))
        return [given[name] for name in self.conditions]

    def check_shape(self, name: str, value: torch.Tensor, expected: tuple[int, ...]) -> None:
        """Raise BadInput unless a condition has the expected shape."""
        if tuple(value.shape) != tuple(expected):
            raise BadInput(f"{type(self).__name__}: {name} has shape {tuple(value.shape)}, expected {tuple(expected)}")

    def check_values(self, x: torch.Tensor) -> None:
        """What must hold of the values; called only under Pyro's validation, since it reads the data."""
        if x.isnan().any():
            rows = x.isnan().flatten(1).any(1).sum().item()
            raise BadInput(f"{type(self).__name__}: x has NaN in {rows} of {len(x)} rows; remove or fill them")


def _first_parameter(module: torch.nn.Module) -> torch.Tensor | None:
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for part in module._modules.values():
        if part is not None and (found := _first_parameter(part)) is not None:
            return found
    return None


class GenerativeModel(OverData):
    """Base of the models p(x, z): ``model(x)`` is the Pyro program, ``model(batch_size=B)`` the same without data.

    ``latents`` maps the latent sites, in the order they are sampled, to what they are; the observed site is ``x``,
    unless ``observed`` names others, and ``summed`` are discrete sites that the model lists itself
    (``infer={"enumerate": "parallel"}``), which no guide draws. Where ``x_is_given`` it is no site but what the rest
    depends on, p(y, z | x): ``model(x, y=y)`` observes the ``targets`` (keywords, with the shape of one datum each),
    ``model(x)`` draws them.

    Values may carry particle dimensions in front, ``(K, B, ...)``: networks accept any number of leading dimensions.
    ``mirror`` says what a guide's networks are by default, so that they mirror the decoder, and, as ``inputs``, what of
    x they see (``log1p`` for counts). ``guide_parents`` may say
    on which latents each latent's posterior should depend, and ``label_site`` which latent is a label that may be
    observed. ``variants`` are small configurations for contract tests and tables.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    docs/extending.md has an example of a subclass.
    """

    latents: dict[str, Latent]
    observed: tuple[str, ...] = ("x",)
    summed: tuple[str, ...] = ()
    targets: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    mirror: Mapping[str, Any] = MappingProxyType({"channels": (), "hidden": (256, 128), "activation": "relu"})
    guide_parents: Mapping[str, tuple[str, ...]] | None = None
    label_site: str | None = None
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    binary_data = False
    observation: Observation

    def observe_by(
        self, likelihood: str, options: Mapping[str, Any] | None = None, shape: Sequence[int] | None = None
    ) -> int:
        """Observe x by that likelihood; how many numbers a decoder gives it. ``observation`` makes p(x | output).

        ``shape`` is the event shape of an observed site, if it is not all of x.
        """
        self.observation = Observation(likelihood, self.data_shape if shape is None else shape, options)
        self.binary_data = likelihood == "bernoulli"
        return self.observation.outputs * math.prod(self.observation.shape)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} must define forward(x=None, *, batch_size=1)")

    def check_values(self, x: torch.Tensor) -> None:
        super().check_values(x)
        if hasattr(self, "observation") and not self.binary_data:
            self.observation.check(x, type(self).__name__)
        if self.binary_data and not ((x == 0) | (x == 1)).all():
            raise BadInput(
                f"{type(self).__name__}: a Bernoulli likelihood needs x of zeros and ones; "
                'load the data with binarize="static" or "dynamic"'
            )

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The keywords to call the model and its guides with, from images and, where they are used, their labels."""
        return {"x": images}

    def sample_prior(self, num_samples: int = 1, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        """Draws of every latent and of what is observed, each ``(num_samples, *shape)``; a global latent has one value.

        ``given`` are the conditions, and ``x`` where that is given: then there is a draw for each row of it.
        """
        rows = {} if self.x_is_given else {"batch_size": num_samples}
        with torch.no_grad(), pyro.get_param_store().scope():
            trace = poutine.trace(self).get_trace(**rows, **given)
        return {name: trace.nodes[name]["value"] for name in (*self.latents, *self.observed)}

    def example(self, rows: int = 2) -> dict[str, torch.Tensor]:
        """A batch to try the programs on, as keywords: what is given is uniform noise, the rest the model's own draws.

        >>> from gumbo.models import NeuralClassifier
        >>> {name: tuple(value.shape) for name, value in NeuralClassifier((1, 8, 8)).example(5).items()}
        {'x': (5, 1, 8, 8), 'y': (5, 10)}
        """
        like = self._like()
        shapes = ({"x": self.data_shape} if self.x_is_given else {}) | dict(self.conditions)
        given = {name: like.new_empty((rows, *shape)).uniform_() for name, shape in shapes.items()}
        draws = self.sample_prior(rows, **given)
        return given | {name: draws[name] for name in (self.targets if self.x_is_given else ("x",))}

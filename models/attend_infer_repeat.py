"""Scenes of several objects: how many there are, where each is, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import mlp
from ._sequences import SILENT

MIN_SCALE = 1.0  # the window of an object is never larger than the scene


def presence(logit: Tensor, before: Tensor) -> Tensor:
    """Logits of a presence: where the object before is absent, so is this one, with probability 1 − e^−100."""
    return torch.lerp(torch.full_like(logit, SILENT), logit, before)


def glimpse(image: Tensor, where: Tensor, height: int, width: int) -> Tensor:
    r"""An image resampled at :math:`u = s c + t`, for c the pixel centres of ``height`` × ``width`` in [−1, 1].

    It is bilinear interpolation with zeros outside, torch's ``grid_sample`` at an ``affine_grid`` without rotation: the
    weights of rows and columns are then two small matrices.

    Args:
        image: ``(..., channels, h, w)``.
        where: the scale s and the shifts t of columns and of rows, ``(..., 3)``.
        height, width: of the result, ``(..., channels, height, width)``.

    >>> image = torch.rand(2, 1, 4, 4)
    >>> torch.allclose(glimpse(image, torch.tensor([1.0, 0.0, 0.0]), 4, 4), image, atol=1e-5)
    True
    """
    scale, across, down = where.unbind(-1)
    rows = _weights(scale, down, height, image.shape[-2]).unsqueeze(-3)
    columns = _weights(scale, across, width, image.shape[-1]).unsqueeze(-3)
    return rows @ image @ columns.transpose(-1, -2)


def _weights(scale: Tensor, shift: Tensor, into: int, of: int) -> Tensor:
    """The weight of each of ``of`` pixels in each of ``into`` new ones along one side, ``(..., into, of)``."""
    centres = (2 * torch.arange(into, dtype=scale.dtype, device=scale.device) + 1) / into - 1
    places = ((scale.unsqueeze(-1) * centres + shift.unsqueeze(-1) + 1) * of - 1) / 2
    pixels = torch.arange(of, dtype=scale.dtype, device=scale.device)
    return relu(1 - (places.unsqueeze(-1) - pixels).abs())


def inverse(where: Tensor) -> Tensor:
    """The transform that undoes ``where``, ``(..., 3)``: from the scene to the window, or back."""
    scale, shift = where[..., :1], where[..., 1:]
    return torch.cat([1 / scale, -shift / scale], -1)


def safe(where: Tensor) -> Tensor:
    """``z_where`` with a scale of at least `MIN_SCALE`, so that it has an inverse."""
    return torch.cat([where[..., :1].clamp(min=MIN_SCALE), where[..., 1:]], -1)


@models.register("attend-infer-repeat")
class AttendInferRepeat(GenerativeModel):
    r"""A scene as a sum of up to T objects, each with a place and a look; their number is inferred.

    .. math:: z^{pres}_t \sim \mathrm{Bernoulli}(\rho\, z^{pres}_{t-1}), \quad
              z^{where}_t \sim N(\mu, \sigma^2), \quad z^{what}_t \sim N(0, I), \qquad
              x \sim N\Big(\sum_t z^{pres}_t\, W(z^{where}_t)\, g(z^{what}_t),\ 0.3^2\Big)

    The number of objects is geometric, cut off at T = ``num_steps``, with ``success`` ρ: ρ < 1/2 favours few objects.
    g decodes a square of ``window`` pixels with values in (0, 1). W places it: z_where is (s, a, b), the ratio of the
    scene's side to the object's, with mean ``scale``, and the object's centre, which is (−a/s, −b/s) of the half sides
    away from the middle. A scale below 1 counts as 1.

    Objects are found before they are counted. Two buffers may follow a schedule, ``success``, and ``judged`` of the
    guide ``recurrent-attention``: ``fit(..., anneal={"success": "step(900, 0.1, 1e-6)", "judged": "step(900)"})``,
    ``--anneal`` on the command line. In the first 900 steps presences are coins that do not see the scene; then the
    network learns them, and windows that share an object are given up.

    Presence is by masks: all T steps run for every scene. z_where and z_what of an absent object have their prior, in
    the model and in the guide ``recurrent-attention``, so that they add nothing to any bound, and an object after an
    absent one is absent with probability 1 − e^−100. Everything is multilinear in the presences, which relaxed
    estimators differentiate through. ``estimators("nvil")`` names an estimator for each site.

    Shapes: ``x`` is ``(B, channels, height, width)``; sites ``z_pres_t``, ``z_where_t`` and ``z_what_t`` are
    ``(B, 1)``, ``(B, 3)`` and ``(B, what_dim)``. ``counts(draws)`` are numbers of objects and ``boxes(z_where)`` their
    places in pixels. Raises BadInput for data of another shape and, under validation, for NaN.

    Args:
        data_shape: ``(channels, height, width)``.
        num_steps: T, the largest number of objects.
        window: side of the square that an object is decoded to, in pixels.
        what_dim: size of the sites ``z_what_t``.
        success: ρ, the probability of one more object, between 0 and 1.
        scale: prior mean of the ratio of the scene's side to an object's.
        scale_sd: prior standard deviation of that ratio.
        place_sd: prior standard deviation of a and b.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        bias: initial bias of the decoder's last layer, a logit: negative for objects that start dark.
        likelihood_sd: standard deviation of a pixel of x.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Eslami et al. 2016, "Attend, infer, repeat: fast scene understanding with generative models", arXiv:1603.08575.

    >>> model = AttendInferRepeat(data_shape=(1, 20, 20), num_steps=2, what_dim=4, hidden=(16,))
    >>> draws = model.sample_prior(5)
    >>> draws["z_where_2"].shape, draws["x"].shape, model.counts(draws).shape
    (torch.Size([5, 3]), torch.Size([5, 1, 20, 20]), torch.Size([5]))
    """

    variants = ({"num_steps": 2, "window": 4, "what_dim": 2, "hidden": (8,), "success": 0.9},)
    _ranges = {"bias": -math.inf}

    def __init__(
        self,
        data_shape: Sequence[int],
        num_steps: int = 3,
        window: int = 8,
        what_dim: int = 10,
        success: float = 0.5,
        scale: float = 2.5,
        scale_sd: float = 0.2,
        place_sd: float = 1.0,
        hidden: Sequence[int] = (100,),
        activation: str = "relu",
        bias: float = -2.0,
        likelihood_sd: float = 0.3,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if len(self.data_shape) != 3:
            raise BadInput(
                f"AttendInferRepeat: data_shape {tuple(data_shape)} must be (channels, height, width), as images have"
            )
        if not 0 < success < 1:
            raise BadInput(f"AttendInferRepeat: success is {success}: expected a probability between 0 and 1")
        self.num_steps, self.window = num_steps, window
        self.latents = {}
        for t in range(1, num_steps + 1):
            self.latents |= {
                f"z_pres_{t}": Latent("bernoulli", (1,)),
                f"z_where_{t}": Latent("normal", (3,)),
                f"z_what_{t}": Latent("normal", (what_dim,)),
            }
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.observe_by("normal", {"sd": likelihood_sd})
        channels = self.data_shape[0]
        self.decoder = mlp([what_dim, *reversed(hidden), channels * window**2], activation)
        nn.init.constant_(self.decoder[-1].bias, bias)
        self.register_buffer("success", torch.tensor(float(success)))
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.register_buffer("where_loc", torch.tensor([scale, 0.0, 0.0]), persistent=False)
        self.register_buffer("where_sd", torch.tensor([scale_sd, place_sd, place_sd]), persistent=False)
        self.register_buffer("what_loc", torch.zeros(what_dim), persistent=False)

    def forward(self, x: Tensor | None = None, *, batch_size: int = 1) -> Tensor:
        with self.data_plate(x, batch_size):
            present, values = self.one, {}
            for t in range(1, self.num_steps + 1):
                logit = presence(self.success.logit().expand(1), present)
                present = values[f"z_pres_{t}"] = pyro.sample(f"z_pres_{t}", dist.Bernoulli(logits=logit).to_event(1))
                for part, loc, sd in (("where", self.where_loc, self.where_sd), ("what", self.what_loc, 1.0)):
                    values[f"z_{part}_{t}"] = pyro.sample(f"z_{part}_{t}", dist.Normal(loc, sd).to_event(1))
            return pyro.sample("x", self.likelihood(values), obs=x)

    def object(self, present: Tensor, where: Tensor, what: Tensor) -> Tensor:
        """One object in an else empty scene, ``(..., *data_shape)``, from its latents."""
        look = self.decoder(what).sigmoid().unflatten(-1, (-1, self.window, self.window))
        return present[..., None, None] * glimpse(look, safe(where), *self.data_shape[1:])

    def likelihood(self, draws: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """p(x | z) for values of all sites, ``(..., *shape)`` each, batch shape ``(...)``."""
        steps = range(1, self.num_steps + 1)
        scene = sum(self.object(*(draws[f"z_{part}_{t}"] for part in ("pres", "where", "what"))) for t in steps)
        return self.observation(scene.flatten(-3))

    def estimators(self, presences: str = "nvil", places: str = "pathwise") -> dict[str, str]:
        """An estimator for each site: ``SiteELBO(model.estimators("nvil"))``.

        Args:
            presences: the word of the sites z_pres.
            places: the word of the sites z_where and z_what.

        >>> AttendInferRepeat((1, 8, 8), num_steps=1).estimators("rloo")
        {'z_pres_1': 'rloo', 'z_where_1': 'pathwise', 'z_what_1': 'pathwise'}
        """
        return {site: presences if site.startswith("z_pres") else places for site in self.latents}

    def counts(self, draws: Mapping[str, Tensor]) -> Tensor:
        """The number of objects of each draw, ``(...)``, from the values of the sites z_pres, ``(..., 1)`` each."""
        return sum(draws[f"z_pres_{t}"] for t in range(1, self.num_steps + 1)).squeeze(-1)

    def boxes(self, where: Tensor) -> Tensor:
        """The squares of objects in pixels, left, top, right and bottom, ``(..., 4)``, from their ``z_where``.

        >>> AttendInferRepeat((1, 20, 20)).boxes(torch.tensor([2.0, 0.0, 1.0]))
        tensor([ 5.,  0., 15., 10.])
        """
        half, centre = inverse(safe(where)).split((1, 2), -1)
        sides = torch.tensor(self.data_shape[:0:-1], dtype=where.dtype, device=where.device)
        return torch.cat([centre - half, centre + half], -1).add(1) / 2 * sides.repeat(2)

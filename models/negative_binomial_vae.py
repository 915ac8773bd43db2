"""A variational autoencoder of counts with varying totals, such as single-cell counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import one_hot

from ..errors import BadInput, UnknownName
from ._base import GenerativeModel, Latent, models
from ._networks import mlp
from .likelihoods import MIN_DISPERSION, likelihoods, negative_binomial

LIBRARIES = ("observed", "latent", "none")


@models.register("negative-binomial-vae")
class NegativeBinomialVAE(GenerativeModel):
    r"""Normal latents under counts: library size, overdispersion, extra zeros, and a batch covariate, as in scVI.

    .. math:: z \sim N(0, I), \qquad \rho = \mathrm{softmax}(f(z, b)), \qquad
              x_g \mid z, l, b \sim \mathrm{NB}(\text{mean}\ l\,\rho_g,\ \text{total count}\ r_g)

    The variance of x_g is mean + mean² / r_g, with r a parameter for each number of x. With ``zero_inflation=True`` an
    x_g is zero with a further probability, of which f gives the logit.

    ``library`` says what l is: ``observed``, the row's own total, given as ``log_library`` ``(B, 1)``; ``latent``, a
    site of that name, log-normal with ``library_loc`` and ``library_sd``, the mean and standard deviation of log totals
    in the data; or ``none``: then l ρ is exp(f). With ``num_batches`` the model and its guides take the covariate
    ``batch``, one-hot ``(B, num_batches)``. ``inputs(x, labels)`` makes these keywords: totals from x, and the
    covariate from labels.

    Shapes: ``x`` is ``(B, *data_shape)``, counts, of which encoders see log(1 + x); site ``z`` is ``(B, latent_dim)``,
    site ``library`` ``(B, 1)``. Raises BadInput for data or covariates of another shape and, under validation, for
    values that are no counts.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        latent_dim: size of site ``z``.
        library: ``observed``, ``latent`` or ``none``.
        zero_inflation: whether zeros have a further probability.
        num_batches: number of values of the covariate ``batch``; 0 has no covariate.
        library_loc: mean of log l under ``library="latent"``.
        library_sd: standard deviation of log l under ``library="latent"``.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics", Nature Methods 15.

    >>> model = NegativeBinomialVAE(data_shape=(30,), latent_dim=2, library="latent", library_loc=5.0)
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'z': (5, 2), 'library': (5, 1), 'x': (5, 30)}
    """

    variants = (
        {"latent_dim": 2, "hidden": (8,)},
        {"latent_dim": 2, "hidden": (8,), "library": "latent", "zero_inflation": True, "num_batches": 2},
    )
    _ranges = {"library_loc": -math.inf, "num_batches": 0}

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int = 10,
        library: str = "observed",
        zero_inflation: bool = False,
        num_batches: int = 0,
        library_loc: float = 0.0,
        library_sd: float = 1.0,
        hidden: Sequence[int] = (128,),
        activation: str = "relu",
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if library not in LIBRARIES:
            raise UnknownName("library", library, LIBRARIES)
        self.total_is, self.num_batches, self.zero_inflation = library, num_batches, zero_inflation
        self.latents = {"z": Latent("normal", (latent_dim,))}
        if library == "latent":
            self.latents["library"] = Latent("log-normal", (1,))
            self.guide_parents = {"z": (), "library": ()}
        self.conditions = {"log_library": (1,)} if library == "observed" else {}
        if num_batches:
            self.conditions = {**self.conditions, "batch": (num_batches,)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation, "inputs": "log1p"}
        size = math.prod(self.data_shape)
        outputs = size * (2 if zero_inflation else 1)
        self.decoder = mlp([latent_dim + num_batches, *reversed(hidden), outputs], activation)
        self.decoder_log_total_count = nn.Parameter(torch.zeros(size))
        for name, value in (("prior_loc", 0.0), ("prior_scale", 1.0)):
            self.register_buffer(name, torch.full((latent_dim,), value), persistent=False)
        for name, value in (("log_total_loc", library_loc), ("log_total_sd", library_sd)):
            self.register_buffer(name, torch.full((1,), float(value)), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1, **given: torch.Tensor) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            values = self.check_conditions(given, batch_size if x is None else len(x))
            covariates = dict(zip(self.conditions, values, strict=True))
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            library = None
            if self.total_is == "latent":
                library = pyro.sample("library", dist.LogNormal(self.log_total_loc, self.log_total_sd).to_event(1))
            elif self.total_is == "observed":
                library = covariates["log_library"].exp()
            return pyro.sample("x", self.likelihood(z, library, covariates.get("batch")), obs=x)

    def likelihood(
        self, z: torch.Tensor, library: torch.Tensor | None = None, batch: torch.Tensor | None = None
    ) -> dist.TorchDistribution:
        """p(x | z, l, b) for ``z`` ``(..., latent_dim)`` and ``library`` ``(..., 1)``, batch shape ``(...)``."""
        inputs = z if batch is None else torch.cat([z, batch.expand(*z.shape[:-1], -1)], -1)
        output = self.decoder(inputs)
        output, gate = output.chunk(2, -1) if self.zero_inflation else (output, None)
        if library is None:
            mean = output.clamp(-30.0, 15.0).exp()
        else:
            mean = library * output.softmax(-1) + torch.finfo(output.dtype).eps
        total_count = self.decoder_log_total_count.exp() + MIN_DISPERSION
        parts = [mean, total_count] if gate is None else [mean, total_count, gate]
        rows = [part.expand(mean.shape).unflatten(-1, self.data_shape) for part in parts]
        return negative_binomial(*rows).to_event(len(self.data_shape))

    def check_values(self, x: torch.Tensor) -> None:
        super().check_values(x)
        if found := likelihoods["negative-binomial"].wants(x):
            raise BadInput(f"{type(self).__name__} needs {found}")

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Counts as ``x``, the logarithm of their total as ``log_library``, and labels, one-hot, as ``batch``."""
        found = {"x": images}
        if "log_library" in self.conditions:
            found["log_library"] = images.flatten(1).sum(-1, keepdim=True).clamp(min=1.0).log()
        if self.num_batches:
            if labels is None or labels.min() < 0 or labels.max() >= self.num_batches:
                raise BadInput(
                    f"NegativeBinomialVAE: the covariate needs labels (N,) below num_batches={self.num_batches}"
                )
            found["batch"] = one_hot(labels, self.num_batches).to(images.dtype)
        return found

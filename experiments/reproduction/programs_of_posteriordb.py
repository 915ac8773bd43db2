"""Posteriors of posteriordb as Pyro programs: the same densities over the data in posteriordb.json.

The simulated examples of Yao et al. 2018, arXiv 1802.02538, are here too, in smaller sizes and without reference
draws. A flat prior of posteriordb becomes a prior that is a thousand times as wide as the scale of the data.
Observations are one event, without a plate, so that many draws run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

WIDE = 1000.0
Data = Mapping[str, Tensor]


@dataclass(frozen=True)
class Program:
    """A model of one argument, that argument, and how draws of its latents become the parameters of the reference."""

    model: Callable[[Tensor], Any]
    y: Tensor
    reported: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def regression(response: Tensor, *columns: Tensor, prior: Sequence[float] | None = None, noise: Any = None) -> Program:
    """Normal noise of unknown ``sigma`` around a linear predictor; flat priors unless they are given.

    ``prior`` is the standard deviation of each coefficient, the intercept's first; ``noise`` the prior of ``sigma``.
    """
    x = torch.stack((torch.ones_like(response), *columns), -1)
    if prior is None:
        spread = response.std() / torch.stack([column.std() for column in columns])
        scale = WIDE * torch.cat([response.abs().max()[None], spread])
    else:
        scale = torch.as_tensor(prior, dtype=x.dtype)
    if noise is None:
        noise = dist.HalfNormal(WIDE * response.std())

    def model(y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        sigma = pyro.sample("sigma", noise)
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Program(model, response)


def cauchy(scale: float):
    return dist.HalfCauchy(torch.tensor(scale, dtype=torch.float64))


def constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- linear regressions of Gelman & Hill 2006


def earnings(response: Callable[[Tensor], Tensor], *columns: Callable[[Data], Tensor]) -> Callable[[Data], Program]:
    return lambda d: regression(response(d["earn"]), *(column(d) for column in columns))


def height(d: Data) -> Tensor:
    return d["height"]


def male(d: Data) -> Tensor:
    return d["male"]


def standard_height(d: Data) -> Tensor:
    return (d["height"] - d["height"].mean()) / d["height"].std()


def kids(*columns: Callable[[Data], Tensor], noise: float | None = None) -> Callable[[Data], Program]:
    def made(d: Data) -> Program:
        prior = None if noise is None else cauchy(noise)
        return regression(d["kid_score"], *(column(d) for column in columns), noise=prior)

    return made


def school(d: Data) -> Tensor:
    return d["mom_hs"]


def iq(d: Data) -> Tensor:
    return d["mom_iq"]


def centred(name: str) -> Callable[[Data], Tensor]:
    return lambda d: d[name] - d[name].mean()


def standardized(name: str) -> Callable[[Data], Tensor]:
    return lambda d: (d[name] - d[name].mean()) / (2 * d[name].std())


def less(name: str, value: float) -> Callable[[Data], Tensor]:
    return lambda d: d[name] - value


def product(one: Callable[[Data], Tensor], other: Callable[[Data], Tensor]) -> Callable[[Data], Tensor]:
    return lambda d: one(d) * other(d)


def is_at(name: str, value: int) -> Callable[[Data], Tensor]:
    return lambda d: (d[name] == value).double()


def bushes(*columns: Callable[[Data], Tensor]) -> Callable[[Data], Program]:
    return lambda d: regression(d["weight"].log(), *(column(d) for column in columns))


def log(name: str) -> Callable[[Data], Tensor]:
    return lambda d: d[name].log()


def volume(d: Data) -> Tensor:
    return (d["diam1"] * d["diam2"] * d["canopy_height"]).log()


def area(d: Data) -> Tensor:
    return (d["diam1"] * d["diam2"]).log()


def shape(d: Data) -> Tensor:
    return (d["diam1"] / d["diam2"]).log()


def group(d: Data) -> Tensor:
    return d["group"]


def mesquite(d: Data) -> Program:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    return regression(d["weight"], *(d[name] for name in names))


def party(d: Data) -> Program:
    ages = [(d["age_discrete"] == k).double() for k in (2, 3, 4)]
    return regression(d["partyid7"], d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"])


# --- other models


def sparse(d: Data) -> Program:
    """A regression without intercept, Normal(0, 10) priors throughout."""
    x, ten = d["X"], constant(10.0)

    def model(y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[-1]).double(), ten).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(ten))
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Program(model, d["y"])


def summers(d: Data) -> Program:
    """Temperatures at Kilpisjärvi by year, with informative priors."""
    x = d["x"]

    def model(y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Normal(d["pmualpha"], d["psalpha"]))
        beta = pyro.sample("beta", dist.Normal(d["pmubeta"], d["psbeta"]))
        sigma = pyro.sample("sigma", dist.HalfNormal(WIDE * d["y"].std()))
        mean = alpha.unsqueeze(-1) + beta.unsqueeze(-1) * x
        pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Program(model, d["y"])


def autoregression(d: Data) -> Program:
    order, y = int(d["K"]), d["y"]
    lags = [y[order - k : len(y) - k] for k in range(1, order + 1)]
    base = regression(y[order:], *lags, prior=[10.0] * (order + 1), noise=cauchy(2.5))

    def split(draws: dict[str, Tensor]) -> dict[str, Tensor]:
        beta = draws["beta"]
        return {"alpha": beta[..., 0], "beta": beta[..., 1:], "sigma": draws["sigma"]}

    return Program(base.model, base.y, split)


def moving_average(d: Data) -> Program:
    ten, two = constant(10.0), constant(2.0)
    before = d["y"]

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0 * ten, ten))
        phi = pyro.sample("phi", dist.Normal(0 * two, two))
        theta = pyro.sample("theta", dist.Normal(0 * two, two))
        sigma = pyro.sample("sigma", cauchy(2.5))
        means = [mu + phi * mu]
        for t in range(1, len(before)):
            means.append(mu + phi * before[t - 1] + theta * (before[t - 1] - means[-1]))
        pyro.sample("y", dist.Normal(torch.stack(means, -1), sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Program(model, before)


def volatility(d: Data) -> Program:
    """GARCH(1, 1); flat over the triangle of alpha1 and beta1."""
    before, first = d["y"], d["sigma1"]
    one, wide = constant(1.0), WIDE * d["y"].std()

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0 * wide, wide))
        alpha0 = pyro.sample("alpha0", dist.HalfNormal(wide**2))
        alpha1 = pyro.sample("alpha1", dist.Beta(one, 2 * one))
        beta1 = pyro.sample("share", dist.Uniform(0 * one, one)) * (1 - alpha1)
        variances = [(first**2).expand_as(mu)]
        for t in range(1, len(before)):
            variances.append(alpha0 + alpha1 * (before[t - 1] - mu) ** 2 + beta1 * variances[-1])
        scale = torch.stack(variances, -1).sqrt()
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1), scale).to_event(1), obs=y)

    def reported(draws: dict[str, Tensor]) -> dict[str, Tensor]:
        beta1 = draws["share"] * (1 - draws["alpha1"])
        return {name: draws[name] for name in ("mu", "alpha0", "alpha1")} | {"beta1": beta1}

    return Program(model, before, reported)


def schools(centered: bool) -> Callable[[Data], Program]:
    def made(d: Data) -> Program:
        five, known = constant(5.0), d["sigma"]

        def model(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0 * five, five))
            tau = pyro.sample("tau", cauchy(5.0))
            if centered:
                spread = tau.unsqueeze(-1).expand(tau.shape + known.shape)
                theta = pyro.sample("theta", dist.Normal(mu.unsqueeze(-1), spread).to_event(1))
            else:
                z = pyro.sample("theta_trans", dist.Normal(torch.zeros_like(known), 1.0).to_event(1))
                theta = z * tau.unsqueeze(-1) + mu.unsqueeze(-1)
            pyro.sample("y", dist.Normal(theta, known).to_event(1), obs=y)

        def reported(draws: dict[str, Tensor]) -> dict[str, Tensor]:
            mu, tau = draws["mu"], draws["tau"]
            theta = draws["theta"] if centered else draws["theta_trans"] * tau.unsqueeze(-1) + mu.unsqueeze(-1)
            return {"theta": theta, "mu": mu, "tau": tau}

        return Program(model, d["y"], reported)

    return made


def mixture(d: Data) -> Program:
    """Two Normal components in order, by the sum and the difference of their means, which are independent."""
    two, five = constant(2.0), constant(5.0)

    def means(draws: dict[str, Tensor]) -> Tensor:
        return torch.stack([draws["sum"] - draws["difference"], draws["sum"] + draws["difference"]], -1) / 2**0.5

    def model(y: Tensor) -> None:
        draws = {"sum": pyro.sample("sum", dist.Normal(0 * two, two))}
        draws["difference"] = pyro.sample("difference", dist.HalfNormal(two))
        sigma = pyro.sample("sigma", dist.HalfNormal(two.expand(2)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(five, five))
        chosen = dist.Categorical(probs=torch.stack([theta, 1 - theta], -1).unsqueeze(-2))
        normal = dist.Normal(means(draws).unsqueeze(-2), sigma.unsqueeze(-2))
        each = dist.MixtureSameFamily(chosen, normal)
        pyro.sample("y", each.expand([*each.batch_shape[:-1], len(y)]).to_event(1), obs=y)

    return Program(model, d["y"], lambda s: {"mu": means(s), "sigma": s["sigma"], "theta": s["theta"]})


def process(d: Data) -> Program:
    """A Gaussian process with the squared-exponential covariance; ``sigma`` is the variance of its noise."""
    squared = (d["x"].unsqueeze(-1) - d["x"]) ** 2
    shape, rate, two, one = constant(25.0), constant(4.0), constant(2.0), constant(1.0)

    def model(y: Tensor) -> None:
        rho = pyro.sample("rho", dist.Gamma(shape, rate))[..., None, None]
        alpha = pyro.sample("alpha", dist.HalfNormal(two))[..., None, None]
        sigma = pyro.sample("sigma", dist.HalfNormal(one))[..., None, None]
        cov = alpha**2 * torch.exp(-squared / (2 * rho**2)) + sigma * torch.eye(len(squared)).double()
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(squared)).double(), cov), obs=y)

    return Program(model, d["y"])


# --- simulated examples of Yao et al. 2018


def normals(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(size: int = 200, dimension: int = 20) -> Program:
    """Section 4.1: Normal(0, 1) coefficients, and Gamma(1/2, 1/2) for the noise's scale."""
    x, one, half = normals(size, dimension), constant(1.0), constant(0.5)
    truth = normals(dimension, seed=1)

    def model(y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros_like(truth), one).to_event(1))
        sigma = pyro.sample("sigma", dist.Gamma(half, half))
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma.unsqueeze(-1)).to_event(1), obs=y)

    return Program(model, x @ truth + normals(size, seed=2))


def logistic(size: int = 100) -> Program:
    """Section 4.2: two coefficients of covariates whose correlation is −0.7."""
    root = torch.linalg.cholesky(torch.tensor([[1.0, -0.7], [-0.7, 1.0]]).double())
    x, one = normals(size, 2) @ root.mT, constant(1.0)

    def model(y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2).double(), one).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)

    noise = torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Program(model, (noise < torch.sigmoid(x @ torch.tensor([1.0, 0.5]).double())).double())


def horseshoe(size: int = 100, dimension: int = 20) -> Program:
    """Section 4.4, on simulated data in place of the leukemia microarrays: three of the coefficients are not zero."""
    x, zero, one = normals(size, dimension, seed=4), torch.zeros(dimension).double(), constant(1.0)
    truth = torch.cat([torch.tensor([2.0, -1.5, 1.0]).double(), zero[3:]])

    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(0.1 * one))
        local = pyro.sample("lambda", dist.HalfCauchy(torch.ones_like(zero)).to_event(1))
        z = pyro.sample("z", dist.Normal(zero, one).to_event(1))
        mean = (z * local * tau.unsqueeze(-1)) @ x.mT
        pyro.sample("y", dist.Normal(mean, one).to_event(1), obs=y)

    return Program(model, x @ truth + normals(size, seed=5))


EXAMPLES: dict[str, Callable[[], Program]] = {"linear": linear, "logistic": logistic, "horseshoe": horseshoe}

_log_bushes = (log("diam1"), log("diam2"), log("canopy_height"), log("total_height"), log("density"), group)
_c, _z = (centred("mom_hs"), centred("mom_iq")), (standardized("mom_hs"), standardized("mom_iq"))
_c2 = (less("mom_hs", 0.5), less("mom_iq", 100.0))

# By posteriordb's name.
PROGRAMS: dict[str, Callable[[Data], Program]] = {
    "earnings-earn_height": earnings(torch.clone, height),
    "earnings-log10earn_height": earnings(torch.log10, height),
    "earnings-logearn_height": earnings(torch.log, height),
    "earnings-logearn_height_male": earnings(torch.log, height, male),
    "earnings-logearn_interaction": earnings(torch.log, height, male, product(height, male)),
    "earnings-logearn_interaction_z": earnings(torch.log, standard_height, male, product(standard_height, male)),
    "earnings-logearn_logheight_male": earnings(torch.log, log("height"), male),
    "kidiq-kidscore_momhs": kids(school, noise=2.5),
    "kidiq-kidscore_momiq": kids(iq, noise=2.5),
    "kidiq-kidscore_momhsiq": kids(school, iq, noise=2.5),
    "kidiq-kidscore_interaction": kids(school, iq, product(school, iq), noise=2.5),
    "kidiq_with_mom_work-kidscore_interaction_c": kids(*_c, product(*_c)),
    "kidiq_with_mom_work-kidscore_interaction_c2": kids(*_c2, product(*_c2)),
    "kidiq_with_mom_work-kidscore_interaction_z": kids(*_z, product(*_z)),
    "kidiq_with_mom_work-kidscore_mom_work": kids(*(is_at("mom_work", k) for k in (2, 3, 4))),
    "mesquite-mesquite": mesquite,
    "mesquite-logmesquite": bushes(*_log_bushes),
    "mesquite-logmesquite_logvolume": bushes(volume),
    "mesquite-logmesquite_logva": bushes(volume, area, group),
    "mesquite-logmesquite_logvas": bushes(volume, area, shape, log("total_height"), log("density"), group),
    "mesquite-logmesquite_logvash": bushes(volume, area, shape, log("total_height"), group),
    "nes1976-nes": party,
    "nes2000-nes": party,
    "sblrc-blr": sparse,
    "sblri-blr": sparse,
    "kilpisjarvi_mod-kilpisjarvi": summers,
    "arK-arK": autoregression,
    "arma-arma11": moving_average,
    "garch-garch11": volatility,
    "eight_schools-eight_schools_centered": schools(True),
    "eight_schools-eight_schools_noncentered": schools(False),
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "gp_pois_regr-gp_regr": process,
}

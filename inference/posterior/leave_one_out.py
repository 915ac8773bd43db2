"""``loo_approximate_posterior``: leave-one-out of global latents, corrected for the guide's error."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import BadInput, UnknownName
from . import _arviz


def loo_approximate_posterior(idata: Any, var_name: str | None = None, pointwise: bool | None = None) -> Any:
    """Leave-one-out cross-validation of a guide's draws, corrected for the difference of guide and posterior.

    ``az.loo`` takes draws of a posterior. Draws of a guide g_s get the weights p(g_s, data) / q(g_s), divided by the
    likelihood of the datum that is left out (Magnusson et al. 2019, arXiv:1904.10679), smoothed as in ``az.loo``. A k̂
    above ``good_k`` of many data at once says that the guide is off, not that these data are influential.

    It needs latents that all data share, such as the weights of a regression. Local latents are integrated out in
    ``log_likelihood``. Where every latent is local, leaving out a datum changes nothing for the others: their
    leave-one-out density is the evidence, ``idata.vi_stats["log_evidence"]``.

    Args:
        idata: the result of :func:`to_arviz`, with the groups ``log_likelihood`` and ``sample_stats``.
        var_name: the observed site, where there are several.
        pointwise: also return each datum's density and k̂; None takes ArviZ's setting.

    Returns:
        ArviZ's ``ELPDData``, which ``az.compare`` takes: of ``arviz_stats.loo_approximate_posterior`` with ArviZ 1.x,
        the same computed here with 0.x. In nats, summed over the data.

    Raises:
        BadInput: no global latent; a guide without a density; draws without the groups or the weights that are needed.
        UnknownName: an unknown ``var_name``.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from gumbo.inference import to_arviz
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> x = torch.tensor([0.3, -1.2, 0.8])
    >>> guide = lambda x: pyro.sample("mean", dist.Normal(x.sum() / 4, 0.6))  # 0.5 is exact
    >>> found = loo_approximate_posterior(to_arviz(model, guide, x), pointwise=True)
    >>> int(found.n_data_points), bool((found.pareto_k < 0.7).all())
    (3, True)
    """
    groups = _arviz.groups_of(idata)
    for name in ("log_likelihood", "sample_stats"):
        if name not in groups:
            raise BadInput(f"the data have no group {name!r}: make them by to_arviz, without groups= or with {name!r}")
    likelihoods = _arviz.dataset_of(idata, "log_likelihood")
    names = [str(name) for name in likelihoods.data_vars]
    if var_name is None and len(names) > 1:
        raise BadInput(f"log_likelihood has {len(names)} variables: name one of {', '.join(names)} as var_name")
    if var_name is not None and var_name not in names:
        raise UnknownName("var_name", var_name, names)
    log_likelihood = likelihoods[var_name or names[0]]
    if likelihoods.attrs.get("constant_over_draws"):
        raise BadInput(
            "every latent is local, so that leaving out a datum changes nothing for the others: "
            'the result is vi_stats["log_evidence"]'
        )
    if points := likelihoods.attrs.get("points"):
        raise BadInput(f"the guide is a point at {points}, so that its draws have no density and no weights")
    log_weight = _log_weight(_arviz.dataset_of(idata, "sample_stats"), likelihoods)
    log_weight = log_weight.sel(chain=log_likelihood["chain"], draw=log_likelihood["draw"])  # of the draws kept
    if float(np.ptp(log_likelihood.values, axis=(0, 1)).max(initial=0.0)) == 0.0:
        raise BadInput("the draws do not vary: the guide is a point, without a density")
    return _arviz.loo_approximate_posterior(idata, log_likelihood, log_weight, pointwise)


def _log_weight(stats: Any, likelihoods: Any) -> Any:
    """log p(g, data) − log q(g) of the global draws ``(chain, draw)``, local latents integrated out."""
    if "log_p_global" in stats:
        if bool(stats["log_q_global"].isnull().any()):
            raise BadInput("the guide draws global latents given local ones, so that their density is not known")
        log_weight = stats["log_p_global"] - stats["log_q_global"]
        for values in likelihoods.data_vars.values():
            log_weight = log_weight + values.sum([dim for dim in values.dims if dim not in ("chain", "draw")])
    else:
        log_weight = stats["log_weight"]
    return log_weight.sum([dim for dim in log_weight.dims if dim not in ("chain", "draw")])

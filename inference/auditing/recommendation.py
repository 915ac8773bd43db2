"""The estimator that an audit recommends, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray


def recommend(dataset: xarray.Dataset) -> tuple[str | None, str]:
    """The estimator with the smallest variance × time among those that pass the audit.

    These are declared unbiased and not flagged; if there is none, those with too few gradients for a verdict are
    considered, and the reason says so.

    Args:
        dataset: the result of :func:`~gumbo.inference.audit`.

    Returns:
        The estimator's label, or None if no unbiased one passes; and the reason in a sentence, which also names the
        biased estimators with their relative bias, since a small one may be acceptable.

    Raises:
        KeyError: a dataset that is no audit.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from gumbo.inference import audit
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
    >>> def guide():
    ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.4))))
    >>> recommend(audit(model, guide, estimators=["rloo", "enumerate"], num_samples=100))[0]
    'enumerate'
    """
    verdict, judged = dataset["verdict"], dataset["total_variance"].notnull()
    good = dataset.sel(estimator=(verdict == "ok").values)
    unsure = not good.sizes["estimator"]
    if unsure:
        undecided = verdict.str.startswith("cannot say") & dataset["unbiased"] & judged
        good = dataset.sel(estimator=undecided.values)
    relaxed = dataset.sel(estimator=(verdict.isin(["biased", "no bias seen"])).values)
    shares = ", ".join(
        f"{label} {share:.0%}" if said == "biased" else f"{label} none seen"
        for label, share, said in zip(
            relaxed["estimator"].values, relaxed["relative_bias"].values, relaxed["verdict"].values, strict=True
        )
    )
    biases = f"; bias of those that do not claim to have none, as a share of the gradient's length: {shares}"
    biases = biases if shares else ""
    if not good.sizes["estimator"]:
        return None, f"no estimator in the audit is declared unbiased and passes{biases}"
    work = good["work_normalized_variance"].values
    least = min(range(len(work)), key=lambda i: (work[i], good["seconds"].values[i]))
    label = str(good["estimator"].values[least])
    caveat = "; too few gradients were drawn to say whether it is unbiased" if unsure else ""
    return label, _reason(label, work, least, good["estimator"].values, unsure) + caveat + biases


def _reason(label: str, work: Any, least: int, labels: Any, unsure: bool) -> str:
    if work[least] == 0:
        return f"{label} has no variance at all and can be afforded here"
    others = [i for i in range(len(work)) if i != least]
    if not others:
        stands = "is not flagged" if unsure else "passes the audit"
        return f"{label} is the only one that is declared unbiased and {stands}"
    second = min(others, key=lambda i: work[i])
    times = f"{work[second] / work[least]:.2g}"
    beside = f"as much as {labels[second]}" if times == "1" else f"{times} times below {labels[second]}"
    return f"{label} has the smallest variance × time among those declared unbiased and not flagged, {beside}"

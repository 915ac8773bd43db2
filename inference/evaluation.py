"""How good a fitted pair is: the bound, the evidence, and the two parts of the bound, in nats per datum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING

import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites

from ..errors import BadInput
from .isolation import device_of, modes_kept, modules_of, private_seed, private_store
from .rows import Rows

if TYPE_CHECKING:
    from .information import Information

# Rows (data times draws) that one run of the programs holds: a bound on memory.
_ROWS_A_RUN = 8192


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: means over the data and their standard errors, in nats per datum.

    ``elbo`` is ``-(rate + distortion)``; ``log_evidence`` is the importance-weighted estimate of log p(x) over
    ``num_samples`` draws, a lower bound in expectation that tightens with the number of draws (Burda et al. 2015,
    arXiv:1509.00519); ``rate`` is E[log q(z | x) - log p(z)] and ``distortion`` is -E[log p(x | z)] (Alemi et al. 2018,
    arXiv:1711.00464). ``kl``, ``active_units`` and ``mutual_information`` are found when asked for.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    num_data: int
    num_samples: int
    _ask: Callable[[], Information] | None = field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, float]:
        """The means, errors and counts; `information` has the rest."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "_ask"}

    @cached_property
    def information(self) -> Information:
        """KL, activity and mutual information, see :func:`~gumbo.inference.information.information`.

        They cost runs of their own and are found when first asked for, with the parameters as they then are.
        """
        if self._ask is None:
            raise BadInput("this evaluation does not know its programs: call gumbo.inference.information.information")
        return self._ask()

    @property
    def kl(self) -> dict[str, torch.Tensor]:
        """KL of the guide to the prior, in nats, by latent site and dimension."""
        return self.information.kl

    @property
    def active_units(self) -> dict[str, torch.Tensor]:
        """Which latent dimensions vary with the data, by site."""
        return self.information.active_units

    @property
    def mutual_information(self) -> float | None:
        """Nats that the latents know of the data; None where the guide's density cannot be had."""
        return self.information.mutual_information


def evaluate(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    num_samples: int = 100,
    batch_size: int = 256,
    seed: int | None = 0,
    plate: str | None = None,
) -> Evaluation:
    """The true bound and the importance-weighted evidence of a model and guide on ``data``, in nats per datum.

    ``data`` is a tensor ``(N, *data_shape)``, a tuple of such tensors (positional arguments of both programs) or a
    mapping of keywords. Any Pyro pair will do whose sites stand in one data plate (``plate`` names it where more than
    one fits) and whose latents the guide all draws. Each datum's log-weight is summed over everything else; a plate's
    subsampling scale does not enter. Latents outside that plate are global (the weights of a regression): their KL is
    spread evenly over the data, ``data_size`` of them where a subsampled plate says how many there are, and enters the
    bound and the rate; ``log_evidence`` is then the log predictive density of each datum, averaged over the guide's
    draws of them. A relaxed pair that knows its exact counterpart is judged by that counterpart.
    Networks run in evaluation mode without gradients; parameters, param store, seeds and training flags stay as they
    were, and the same ``seed`` gives the same numbers (``None`` draws from the current stream).

    Raises :class:`~gumbo.errors.BadInput` for empty data, NaN, an observed site outside the data plate, or a latent
    that only one of the two programs draws.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def exact_posterior(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> x = torch.tensor([0.3, -1.2])
    >>> truth = dist.Normal(0.0, 2**0.5).log_prob(x).mean()
    >>> found = evaluate(model, exact_posterior, x, num_samples=5)
    >>> bool(torch.isclose(torch.tensor(found.log_evidence), truth)), abs(found.elbo - found.log_evidence) < 1e-5
    (True, True)
    """
    parts = log_weights(model, guide, data, num_samples=num_samples, batch_size=batch_size, seed=seed, plate=plate)
    log_weight = parts["log_prior"] + parts["log_likelihood"] - parts["log_q"]
    evidence = torch.logsumexp(log_weight, 0) - math.log(num_samples)
    rate = (parts["log_q"] - parts["log_prior"] - parts["log_global"]).mean(0)
    distortion = -parts["log_likelihood"].mean(0)
    numbers: dict[str, float] = {}
    for name, value in (
        ("elbo", (log_weight + parts["log_global"]).mean(0)),
        ("log_evidence", evidence),
        ("rate", rate),
        ("distortion", distortion),
    ):
        numbers[name], numbers[f"{name}_se"] = _mean_and_error(value)

    def ask() -> Information:
        from .information import information

        with private_seed(None, model, guide):
            pair = exact_pair(model, guide)
        return information(*pair, data, seed=seed, plate=plate)

    return Evaluation(**numbers, num_data=log_weight.shape[1], num_samples=num_samples, _ask=ask)


def log_weights(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    num_samples: int = 100,
    batch_size: int = 256,
    seed: int | None = 0,
    plate: str | None = None,
) -> dict[str, torch.Tensor]:
    """``log_prior``, ``log_likelihood`` and ``log_q`` in nats, each ``(num_samples, N)`` in float64.

    ``log_global`` of the same shape is log p - log q of the latents outside the data plate, each datum's share.
    """
    rows = Rows(data).check("data")
    if num_samples < 1:
        raise BadInput(f"num_samples is {num_samples}: expected at least 1")
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}: expected at least 1")
    with private_seed(None, model, guide):
        model, guide = exact_pair(model, guide)
    device = device_of(model, guide)
    pieces: list[dict[str, torch.Tensor]] = []
    with private_store(model, guide), private_seed(seed, model, guide), modes_kept(model, guide), torch.no_grad():
        for module in modules_of(model, guide):
            module.eval()
        for start in range(0, len(rows), batch_size):
            pieces.append(_batch(model, guide, rows[start : start + batch_size].to(device), num_samples, plate))
    for piece in pieces:
        # A plate that is no subsample of more stands for the data at hand, which here came in batches.
        piece["log_global"] = piece["log_global"] / (piece.pop("data_size") or len(rows))
    return {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}


def exact_pair(model: Callable, guide: Callable) -> tuple[Callable, Callable]:
    """The discrete programs behind a relaxed pair, over the same networks; any other pair itself.

    A relaxed model says so by ``relaxed``, gives its discrete form by ``exact()``, and its guide by ``exact(model)``.
    """
    if not getattr(model, "relaxed", False):
        return model, guide
    if not (hasattr(model, "exact") and hasattr(guide, "exact")):
        raise BadInput(
            f"{type(model).__name__} is relaxed: to report its discrete bound, it must define exact() and "
            f"{type(guide).__name__} must define exact(model)"
        )
    discrete = model.exact()
    return discrete, guide.exact(discrete)


def _batch(
    model: Callable, guide: Callable, batch: Rows, num_samples: int, plate: str | None
) -> dict[str, torch.Tensor]:
    """All draws of one batch: copies of the rows in one run where the plate grows with them, else one by one."""
    name, grows, data_size = _data_plate(model, guide, batch, plate)
    per_run = max(1, min(num_samples, _ROWS_A_RUN // len(batch))) if grows else 1
    draws: list[dict[str, torch.Tensor]] = []
    left = num_samples
    while left:
        now = min(left, per_run)
        parts = _run(model, guide, batch.repeated(now), name)
        draws.append({part: value.reshape(now, len(batch)) for part, value in parts.items()})
        left -= now
    return {part: torch.cat([draw[part] for draw in draws]) for part in draws[0]} | {"data_size": data_size}


def _data_plate(model: Callable, guide: Callable, batch: Rows, plate: str | None) -> tuple[str, bool, int | None]:
    """The plate over the data, whether it grows with the rows it is given, and of how many it is a subsample."""
    with private_seed(None, model, guide):
        guide_trace, model_trace = _traces(model, guide, batch)
    _check_latents(guide_trace, model_trace)
    shared: dict | None = None
    apart = False
    for trace in (guide_trace, model_trace):
        for name, site in _random_sites(trace):
            if not site["is_observed"] and not any(f.size == len(batch) for f in _frames(site)):
                apart = True
                continue
            frames = {f.name: f for f in _frames(site) if f.size == len(batch)}
            shared = frames if shared is None else {key: f for key, f in shared.items() if key in frames}
            if not shared:
                raise BadInput(
                    f"site {name!r} stands outside the data plate: evaluate needs what is observed within one plate "
                    f"of {len(batch)} rows, as long as the data's first axis"
                )
    if not shared:
        raise BadInput("neither program has a random site: there is nothing to evaluate")
    if plate is not None and plate not in shared:
        raise BadInput(
            f"no plate {plate!r} of {len(batch)} rows encloses every site; those that do: {', '.join(shared)}"
        )
    if plate is None and len(shared) > 1:
        raise BadInput(f"plates {', '.join(shared)} all fit the data: name one with plate=")
    frame = shared[plate] if plate is not None else next(iter(shared.values()))
    whole = frame.full_size == frame.size
    # Copies of the rows would all see one draw of what stands outside the plate.
    grows = whole and not apart and _accepts_copies(model, guide, batch)
    return frame.name, grows, None if whole else frame.full_size


def _accepts_copies(model: Callable, guide: Callable, batch: Rows) -> bool:
    """Whether the plate follows the number of rows; one of a fixed size refuses another number of them."""
    try:
        with private_seed(None, model, guide):
            _traces(model, guide, batch[:1].repeated(1 if len(batch) == 2 else 2))
    except (RuntimeError, ValueError):
        return False
    return True


def _traces(model: Callable, guide: Callable, batch: Rows) -> tuple[Trace, Trace]:
    guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch.args, **batch.kwargs)
    return prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)


def _random_sites(trace: Trace) -> list[tuple[str, dict]]:
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["infer"].get("_deterministic")
    ]


def _frames(site: dict) -> list:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _check_latents(guide_trace: Trace, model_trace: Trace) -> None:
    drawn = {
        name
        for name, site in _random_sites(guide_trace)
        if not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }
    latent = {name for name, site in _random_sites(model_trace) if not site["is_observed"]}
    for name in sorted(latent - drawn):
        raise BadInput(f"site {name!r} is latent in the model but the guide does not draw it: add it to the guide")
    for name in sorted(drawn - latent):
        raise BadInput(f"site {name!r} is drawn by the guide but is no latent of the model: remove it or rename it")


def _run(model: Callable, guide: Callable, batch: Rows, plate: str) -> dict[str, torch.Tensor]:
    guide_trace, model_trace = _traces(model, guide, batch)
    zeros = torch.zeros(len(batch), dtype=torch.float64, device=device_of(model, guide))
    parts = dict.fromkeys(("log_prior", "log_likelihood", "log_q", "log_global"), zeros)
    for trace, latent_part, observed_part in (
        (guide_trace, "log_q", "log_q"),
        (model_trace, "log_prior", "log_likelihood"),
    ):
        trace.compute_log_prob()
        for name, site in _random_sites(trace):
            apart = all(frame.name != plate for frame in site["cond_indep_stack"])
            value = site["log_prob"].double().sum().expand(len(batch)) if apart else _per_datum(site, plate, len(batch))
            if torch.isnan(value).any():
                raise BadInput(
                    f"site {name!r} has a log-probability of NaN: look at the parameters of its distribution"
                )
            if apart:
                parts["log_global"] = parts["log_global"] + (-value if trace is guide_trace else value)
                continue
            part = observed_part if site["is_observed"] else latent_part
            parts[part] = parts[part] + value
    return parts


def _per_datum(site: dict, plate: str, num_rows: int) -> torch.Tensor:
    """The site's log-probability of each datum ``(B,)``, summed over everything else, without any subsampling scale."""
    frame = next(frame for frame in site["cond_indep_stack"] if frame.name == plate)
    log_prob = site["log_prob"].double() * (frame.size / frame.full_size)
    if log_prob.dim() < -frame.dim:
        log_prob = log_prob.expand(num_rows, *[1] * (-frame.dim - 1))
    others = [dim for dim in range(-log_prob.dim(), 0) if dim != frame.dim]
    return (log_prob.sum(others) if others else log_prob).expand(num_rows)


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error

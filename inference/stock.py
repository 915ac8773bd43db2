"""Pyro's own ELBOs by word, for comparisons and audits with gumbo's estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from ..errors import BadInput
from ..options import check_option
from ..registry import Registry
from .elbo import SiteELBO


class LatentsWeighted(Messenger):
    """Multiplies the log-probabilities of latent sites by a weight, in model and guide."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg) -> None:
        if self.weight != 1.0 and not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


stock_elbos: Registry[Callable[..., ELBO]] = Registry("stock ELBO")


@stock_elbos.register("trace-graph+baseline")
class TraceGraphBaselineELBO(TraceGraph_ELBO):
    """TraceGraph_ELBO with its decaying-average baseline enabled at every latent site.

    The param store keeps an average for each plate element, so that all batches must have the same size.
    """

    def _get_trace(self, model, guide, args, kwargs):
        def mark(site) -> Any:
            if site["is_observed"] or "baseline" in site["infer"]:
                return {}
            return {"baseline": {"use_decaying_avg_baseline": True}}

        return super()._get_trace(model, poutine.infer_config(guide, config_fn=mark), args, kwargs)


@stock_elbos.register("trace-enum")
class TraceEnumELBO(TraceEnum_ELBO):
    """TraceEnum_ELBO with every site that Pyro can enumerate enumerated in parallel."""

    def __init__(self, **options: Any):
        super().__init__(strict_enumeration_warning=False, **options)

    def _get_traces(self, model, guide, args, kwargs):
        return super()._get_traces(model, config_enumerate(guide, default="parallel"), args, kwargs)


stock_elbos.register("trace", Trace_ELBO)
stock_elbos.register("trace-graph", TraceGraph_ELBO)
stock_elbos.register("trace-meanfield", TraceMeanField_ELBO)


def make_loss(word: Any, num_particles: int | None = None, **options: Any) -> ELBO:
    """The loss that a word names: one of Pyro's ELBOs, or a :class:`SiteELBO` (which takes more options).

    Args:
        word: a word of `stock_elbos`; a word, a mapping or an estimator that :class:`SiteELBO` takes; or a loss.
        num_particles: draws that the loss is averaged over; None is the estimators' own minimum, 1 for Pyro's ELBOs.
        options: of :class:`SiteELBO`; of a stock ELBO ``vectorize_particles`` and ``max_plate_nesting`` only.

    Returns:
        The loss; a ``word`` that is a loss is returned unchanged.

    Raises:
        UnknownName: a word that names neither.
        BadInput: an option that the loss does not have.

    >>> type(make_loss("trace-graph")).__name__, make_loss("rloo")
    ('TraceGraph_ELBO', SiteELBO('rloo', objective='elbo', num_particles=None))
    """
    if isinstance(word, ELBO):
        return word
    if not (isinstance(word, str) and word in stock_elbos):
        return SiteELBO(word, num_particles=num_particles, **options)
    check_option("num_particles", num_particles, int | None)
    foreign = set(options) - {"vectorize_particles", "max_plate_nesting"}
    if foreign:
        raise BadInput(f"Pyro's own ELBO {word!r} has no option {sorted(foreign)[0]!r}; use one of gumbo's estimators")
    if options.get("max_plate_nesting", 0) is None:
        options.pop("max_plate_nesting")
    return stock_elbos[word](num_particles=num_particles or 1, **options)


def objective_name(loss: ELBO) -> str:
    """The name of a loss's value, as ``fit`` reports it: ``elbo``, or the word for another bound of Pyro's.

    Raises BadInput for a loss of Pyro's without one value.

    >>> from pyro.infer import RenyiELBO
    >>> objective_name(RenyiELBO()), objective_name(Trace_ELBO())
    ('renyi', 'elbo')
    """
    if isinstance(loss, ReweightedWakeSleep):
        raise BadInput(
            "ReweightedWakeSleep has one loss for the model and one for the guide, and fit takes one: take "
            "SiteELBO(objective='rws')"
        )
    if isinstance(loss, TraceTailAdaptive_ELBO):
        raise BadInput("TraceTailAdaptive_ELBO has no value that fit could watch: it returns inf; take a SiteELBO")
    own = ((RenyiELBO, "renyi"), (TraceTMC_ELBO, "tmc"), (Trace_MMD, "mmd"))
    return next((name for kind, name in own if isinstance(loss, kind)), "elbo")


def is_differentiable(loss: object) -> bool:
    """Whether an ELBO gives one differentiable scalar; stock TraceGraph_ELBO, for one, only takes gradients itself."""
    return getattr(loss, "differentiable", True) and hasattr(type(loss), "differentiable_loss")

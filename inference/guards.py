"""What made a training run stop being finite, in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

import pyro.poutine as poutine
import torch

from ..errors import GumboError
from .rows import Rows


class Guard:
    """Stops a run whose loss or parameters are not finite, and says which parameter or site it is.

    ``advice`` is what to say beside it: where the last good state lies.
    """

    def __init__(self, model: Callable, guide: Callable, parameters: Mapping[str, torch.Tensor]):
        self.model, self.guide, self.parameters = model, guide, parameters
        self.advice = ""

    def explain(self, loss: float, where: str, batch: Rows) -> NoReturn:
        """Raise GumboError for a loss that is not finite."""
        self.after_step(where)
        site = _broken_site(self.model, self.guide, batch)
        what = (
            f"site {site!r} has a log-probability that is not finite" if site else "every site of a new draw is finite"
        )
        raise GumboError(f"training stopped at {where}: the loss is {loss}; {what}{self.advice}")

    def after_step(self, where: str, cause: Exception | None = None) -> None:
        """Raise GumboError for a parameter that is not finite."""
        for name, parameter in self.parameters.items():
            if not torch.isfinite(parameter).all():
                raise GumboError(
                    f"training stopped at {where}: parameter {name!r} is no longer finite; lower the learning rate"
                    f"{self.advice}"
                ) from cause


def _broken_site(model: Callable, guide: Callable, batch: Rows) -> str | None:
    """The first site of a fresh run whose log-probability is not finite."""
    with torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch.args, **batch.kwargs)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not torch.isfinite(site["fn"].log_prob(site["value"])).all():
                    return name
    return None

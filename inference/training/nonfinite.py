"""One-line explanations of a loss or parameter that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger

from ...errors import GumboError
from ..engine.rows import Rows


class Guard:
    """Stops a run whose loss or parameters are not finite, and names the parameter or site.

    ``advice`` is added to the message: where the last good state is stored.
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

    def explain_error(self, error: Exception, where: str, batch: Rows) -> None:
        """Raise GumboError where a parameter or site that is not finite explains the error; else return."""
        self.after_step(where, error)
        if site := _broken_site(self.model, self.guide, batch):
            raise GumboError(
                f"training stopped at {where}: site {site!r} has a log-probability that is not finite{self.advice}"
            ) from error

    def after_step(self, where: str, cause: Exception | None = None) -> None:
        """Raise GumboError for a parameter that is not finite."""
        for name, parameter in self.parameters.items():
            if not torch.isfinite(parameter).all():
                raise GumboError(
                    f"training stopped at {where}: parameter {name!r} is no longer finite; lower the learning rate"
                    f"{self.advice}"
                ) from cause


class _FirstBroken(Messenger):
    """Records the first site that has a log-probability that is not finite, or that cannot be drawn."""

    site: str | None = None
    _begun: str | None = None

    def _pyro_sample(self, msg) -> None:
        self._begun = msg["name"]

    def _pyro_post_sample(self, msg) -> None:
        if self.site is None and not torch.isfinite(msg["fn"].log_prob(msg["value"])).all():
            self.site = msg["name"]
        self._begun = None

    def seen(self) -> str | None:
        return self.site or self._begun


def _broken_site(model: Callable, guide: Callable, batch: Rows) -> str | None:
    """The first site of a fresh run whose log-probability is not finite."""
    look = _FirstBroken()
    # Pyro's validation refuses the values that this looks for, and a draw from them may fail without it.
    with suppress(Exception), pyro.validation_enabled(False), torch.no_grad():
        trace = poutine.trace(look(guide)).get_trace(*batch.args, **batch.kwargs)
        poutine.replay(look(model), trace=trace)(*batch.args, **batch.kwargs)
    return look.seen()

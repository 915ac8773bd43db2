"""What made a training run stop being finite, in one line."""

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
    """Notes the first site whose log-probability is not finite, or that cannot be drawn at all."""

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
    # Pyro's validation would refuse the very values that are looked for, and a draw from them may fail without it.
    with suppress(Exception), pyro.validation_enabled(False), torch.no_grad():
        trace = poutine.trace(look(guide)).get_trace(*batch.args, **batch.kwargs)
        poutine.replay(look(model), trace=trace)(*batch.args, **batch.kwargs)
    return look.seen()

"""Pyro's effect-based guides (AutoMessenger), which run the model themselves, as ordinary programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.guide import GuideMessenger


class MessengerProgram:
    """A guide that runs the model under its own handlers, with the model's observed sites hidden.

    Its draws are the model's latents, from the posterior that replaces each prior; then the model runs once more with
    them, as with any guide.
    """

    def __init__(self, guide: Callable):
        self.inner_program = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_fn=_is_data):
            return self.inner_program(*args, **kwargs)


def _is_data(site: Mapping[str, Any]) -> bool:
    """Whether the model observes or computes a site, factors included."""
    return site["type"] == "sample" and bool(site["is_observed"])


def as_program(guide: Callable) -> Callable:
    """The guide itself, or a program that wraps a guide which runs the model."""
    return MessengerProgram(guide) if isinstance(poutine.unwrap(guide), GuideMessenger) else guide

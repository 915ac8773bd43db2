"""Pyro's effect-based guides (AutoMessenger), which run the model themselves, as programs like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.guide import GuideMessenger


class MessengerProgram:
    """A guide that runs the model under its own handlers, with nothing of the model's data to be seen.

    What it draws are the model's latents, under the posterior that it puts in place of each prior; the model is then
    run once more against them, as against any guide.
    """

    def __init__(self, guide: Callable):
        self.inner_program = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_fn=_is_data):
            return self.inner_program(*args, **kwargs)


def _is_data(site: Mapping[str, Any]) -> bool:
    """Whether a site is one that the model observes or computes, a factor included."""
    return site["type"] == "sample" and bool(site["is_observed"])


def as_program(guide: Callable) -> Callable:
    """The guide itself, or a program around one that runs the model itself."""
    return MessengerProgram(guide) if isinstance(poutine.unwrap(guide), GuideMessenger) else guide

"""Pyro's messengers that decide for a program: its rows, its latents, and whether its data are observed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from ..estimators._base import detached_draw
from ..estimators._distributions import without_own_validation
from .handlers import CheckedRows


class ChosenRows(CheckedRows):
    """Sets the rows of subsampled plates, and records the plates that would have drawn them at random.

    Args:
        rows: the rows by plate.
        drawn_only: skip the plates whose rows the program itself sets.
    """

    def __init__(self, rows: Mapping[str, torch.Tensor], drawn_only: bool = True):
        super().__init__()
        self.rows, self.drawn_only = rows, drawn_only
        self.random: set[str] = set()

    def _pyro_sample(self, msg) -> None:
        if not site_is_subsample(msg):
            return
        if msg["value"] is None and msg["fn"].subsample_size not in (None, msg["fn"].size):
            self.random.add(msg["name"])
        if msg["name"] in self.rows and not msg["done"] and (msg["value"] is None or not self.drawn_only):
            msg["value"] = self.rows[msg["name"]].to(msg["fn"].device)
            msg["done"] = True


class GivenValues(Messenger):
    """Sets latent sites and plate rows to given values; observed sites do not change.

    Args:
        values: the values by site.
        as_data: mark the latent sites as observed for outer handlers, so that they are not enumerated.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], as_data: bool = False):
        super().__init__()
        self.values, self.as_data = values, as_data

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["is_observed"] = self.as_data and not site_is_subsample(msg)
            msg["done"] = not msg["is_observed"]


class DrawnAnew(Messenger):
    """Draws observed sites instead."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.names and msg["is_observed"]:
            msg["is_observed"] = False
            msg["value"] = None
            msg["done"] = False


class DrawnDetached(Messenger):
    """Draws without gradients, so that each site depends on its own parameters only."""

    def _pyro_sample(self, msg) -> None:
        if not (msg["done"] or msg["is_observed"] or site_is_subsample(msg)):
            msg["value"] = detached_draw(msg["fn"], msg["args"], msg["kwargs"]).value
            msg["done"] = True


class Unvalidated(Messenger):
    """Removes distributions' own validation settings, so that they follow the global one."""

    def _pyro_sample(self, msg) -> None:
        if isinstance(msg["fn"], torch.distributions.Distribution):
            msg["fn"] = without_own_validation(msg["fn"])

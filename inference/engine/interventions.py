"""Pyro's messengers that decide for a program: its rows, its latents, and whether its data are observed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from .handlers import CheckedRows


class ChosenRows(CheckedRows):
    """Gives subsampled plates their rows, and notes which of them would have drawn them at random."""

    def __init__(self, rows: Mapping[str, torch.Tensor]):
        super().__init__()
        self.rows = rows
        self.random: set[str] = set()

    def _pyro_sample(self, msg) -> None:
        if not site_is_subsample(msg):
            return
        if msg["value"] is None and msg["fn"].subsample_size not in (None, msg["fn"].size):
            self.random.add(msg["name"])
        if msg["name"] in self.rows and msg["value"] is None:
            msg["value"] = self.rows[msg["name"]].to(msg["fn"].device)
            msg["done"] = True


class GivenValues(Messenger):
    """Latent sites take the values given; observed sites stay as they are."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class DrawnAnew(Messenger):
    """Observed sites are drawn instead."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.names and msg["is_observed"]:
            msg["is_observed"] = False
            msg["value"] = None
            msg["done"] = False

"""Exact sums over the values of a site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._base import Estimator, estimators
from ._distributions import finite_support

LIMIT = 2**14


class Enumerate(Estimator):
    """Sum over every value of the site, weighted by its probability: exact, without draws.

    Sums over the product of the coordinates of an event (``.to_event``). Elements of a plate are enumerated in parallel
    where the program keeps them independent, and jointly where a later site combines them.

    Args:
        limit: the largest number of values of a site. Another limit than the default also bounds its combinations with
            other sites; where these are enumerated at once, ``SiteELBO(memory_limit=…)`` bounds their bytes.

    >>> Enumerate().unbiased
    True
    """

    enumerates = True

    def __init__(self, limit: int = LIMIT):
        self.limit = int(limit)

    def listed(self, fn: Any, joint: int, name: str) -> Tensor | str:
        """The values of a site by :func:`finite_support`, or the reason why they cannot be enumerated."""
        return finite_support(fn, joint=joint, limit=self.limit)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        listed = finite_support(site["fn"], joint=0, limit=self.limit)
        return listed if isinstance(listed, str) else None


estimators.register("enumerate", Enumerate)

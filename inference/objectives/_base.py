"""The contract of an objective: what is estimated, which estimators serve it, and what its value is called.

``SiteELBO`` runs the programs, and hands what it recorded to its objective once. A new objective is one class in one
file of this folder, a word in ``objectives`` and one import line in the folder's ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...errors import BadInput, Refusal, UnknownName
from ...registry import Registry
from ..engine.terms import Recorded
from ..estimators._base import Estimator


class Objective:
    """What a loss estimates; a class of its own for each.

    Class attributes:
        name: the word for it.
        weighs_rows: whether each datum has a weight of its own, so that plates must keep their rows apart.
        takes_estimators: whether sites take estimators; otherwise all draws are made without gradients.
        takes_kl_weight: whether a weight of the latent terms is defined.
        runs_model: whether the first runs are of the model too.
        sums_over_rows: whether the value is a sum over rows and over terms outside their plate: several processes may
            hold a part of the rows each.

    >>> sorted(objectives)
    ['elbo', 'free-bits', 'iwae', 'rws']
    """

    name: str = ""
    weighs_rows: bool = False
    takes_estimators: bool = True
    takes_kl_weight: bool = False
    runs_model: bool = True
    sums_over_rows: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def accepts(self, estimator: Estimator) -> bool:
        """Whether an estimator's gradient is derived for this objective."""
        return self.name in estimator.objectives

    def refusal(self, estimator: Estimator) -> Refusal | None:
        """Why an estimator cannot serve this objective, or None if it can."""
        return None if self.accepts(estimator) else Refusal(f"it is not derived for objective {self.name!r}")

    def refined(self, chosen: Mapping[str, Estimator]) -> Objective:
        """The objective whose gradient the estimators of all sites together ask for; mostly itself."""
        return self

    def value(self, recorded: Recorded) -> Tensor:
        """A scalar: its value is that of the objective, its gradient an estimate of the objective's gradient."""
        raise BadInput(f"objective {type(self).__name__} must define value(recorded), a scalar tensor")

    def value_name(self, chosen: Mapping[str, Estimator], kl_weight: Any) -> str:
        """What the value is called, given the sites' estimators."""
        return self.name


def _expected(found: Any) -> str:
    own = isinstance(found, type) and issubclass(found, Objective)
    return "" if own else "a subclass of Objective"


objectives: Registry[Callable[[], Objective]] = Registry("objective", _expected)


def as_objective(word: str | Objective | type[Objective]) -> Objective:
    """The objective that a word names, or the objective itself.

    >>> as_objective("iwae")
    ImportanceWeightedBound()
    """
    if isinstance(word, Objective):
        return word
    if isinstance(word, type) and issubclass(word, Objective):
        return word()
    if not isinstance(word, str):
        raise UnknownName("objective", word, objectives)
    found = objectives[word]()
    if not isinstance(found, Objective):
        raise BadInput(f"{word!r} names {found!r}, which is not an Objective")
    return found

"""The interface of an objective: its value, the estimators it supports, and the name of its value.

``SiteELBO`` runs the programs, and passes what it recorded to its objective once. A new objective is one class in one
file of this folder, a word in ``objectives`` and one import line in the folder's ``__init__``. Its options (an order, a
proposal) are the arguments of its constructor: ``SiteELBO(objective=word, option=…)`` passes them on, and they are
checked against their annotations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...errors import BadInput, Refusal, UnknownName
from ...options import Checked, with_options
from ...registry import Registry
from ..engine.terms import Recorded
from ..estimators._base import Estimator


class Objective(Checked):
    """What a loss estimates; one class per objective.

    Class attributes:
        name: its word.
        weighs_rows: whether each datum has its own weight, so that plates must keep their rows independent.
        takes_estimators: whether sites take estimators; otherwise all draws are made without gradients.
        takes_kl_weight: whether a weight of the latent terms is defined.
        runs_model: whether the first runs include the model.
        learns_model: whether it has a gradient for the model's parameters; otherwise it refuses trainable ones.
        min_particles: the smallest K that it is defined for.
        proposal: a program that makes the draws in place of the guide, or None.
        reports: names of further values that it reports by ``recorded.report(name, value)`` in each call; ``fit`` gives
            them per datum.
        gradient_of: the objective whose gradient it has in expectation, if that is another one; "" for its own.
        sums_over_rows: whether the value is a sum over rows and over terms outside their plate: then several processes
            may each hold a part of the rows.

    >>> sorted(objectives)
    ['elbo', 'free-bits', 'iwae', 'log-variance', 'log-variance+elbo', 'renyi', 'rws']
    """

    name: str = ""
    weighs_rows: bool = False
    takes_estimators: bool = True
    takes_kl_weight: bool = False
    runs_model: bool = True
    sums_over_rows: bool = False
    learns_model: bool = True
    min_particles: int = 1
    proposal: Callable | None = None
    reports: tuple[str, ...] = ()
    gradient_of: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Its options by name."""
        return {name: value for name, value in sorted(vars(self).items()) if not name.startswith("_")}

    @property
    def said(self) -> str:
        """The word with its options, if any, as in ``renyi(alpha=0.5)``."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
        return f"{self.name}({options})" if options else self.name

    def __repr__(self) -> str:
        return with_options(self)

    def accepts(self, estimator: Estimator) -> bool:
        """Whether the objective supports an estimator's gradient."""
        return self.name in estimator.objectives

    def refusal(self, estimator: Estimator) -> Refusal | None:
        """Why the objective does not support an estimator, or None if it does."""
        return None if self.accepts(estimator) else Refusal(f"it is not derived for objective {self.name!r}")

    def refined(self, chosen: Mapping[str, Estimator]) -> Objective:
        """The objective whose gradient the estimators of all sites together need; usually itself."""
        return self

    def bound(self, log_weight: Tensor, dim: int) -> Tensor:
        """The value of a datum with log importance weights along ``dim``, which is kept with size 1.

        For objectives with weights per row that depend on the weights alone; exact references use it.
        """
        raise BadInput(f"objective {self.name!r} is not a function of importance weights alone")

    def value(self, recorded: Recorded) -> Tensor:
        """A scalar with the objective's value, whose gradient is an estimate of the objective's gradient."""
        raise BadInput(f"objective {type(self).__name__} must define value(recorded), a scalar tensor")

    def value_name(self, chosen: Mapping[str, Estimator], kl_weight: Any) -> str:
        """The name of the value, given the sites' estimators."""
        return self.name


def _expected(found: Any) -> str:
    own = isinstance(found, type) and issubclass(found, Objective)
    return "" if own else "a subclass of Objective"


objectives: Registry[Callable[[], Objective]] = Registry("objective", _expected)


def as_objective(word: str | Objective | type[Objective], options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a word with these options, or the objective itself.

    Args:
        word: a word, an import path, an :class:`Objective`, or a subclass of it.
        options: options of its constructor, by name.

    Returns:
        The objective.

    Raises:
        UnknownName: an unknown word.
        BadInput: an option that the objective does not have, or another kind of object.

    >>> as_objective("iwae")
    ImportanceWeightedBound()
    >>> as_objective("renyi", {"alpha": 0.25}).said
    'renyi(alpha=0.25)'
    """
    options = dict(options or {})
    if isinstance(word, Objective):
        if options:
            raise BadInput(f"objective {word!r} is made already: give {sorted(options)[0]!r} to {type(word).__name__}")
        return word
    if isinstance(word, type) and issubclass(word, Objective):
        make: Callable[..., Objective] = word
    elif isinstance(word, str):
        make = objectives[word]
    else:
        raise UnknownName("objective", word, objectives)
    make_of = make.__init__ if isinstance(make, type) else make
    known = (
        [] if make_of is object.__init__ else [name for name in inspect.signature(make_of).parameters if name != "self"]
    )
    for name in options:
        if name not in known:
            its = f"its options: {', '.join(known)}" if known else "it has none"
            raise BadInput(f"objective {word!r} has no option {name!r} ({its}), and SiteELBO has none of that name")
    found = make(**options)
    if not isinstance(found, Objective):
        raise BadInput(f"{word!r} names {found!r}, which is not an Objective")
    return found

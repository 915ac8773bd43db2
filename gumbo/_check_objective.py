"""The contract suite of objectives, on two small programs."""

from __future__ import annotations

import copy

import pyro
import torch
from torch import Tensor, nn

from ._check_estimator import gradient_of, require, small_programs
from .errors import BadInput, GumboError, UnsupportedSite
from .inference.auditing.exact import mean_over_draws
from .inference.elbo import SiteELBO
from .inference.estimators import Estimator, estimators
from .inference.objectives import Objective, as_objective

PARTICLES = 2
ROWS = 3
# Words whose draws can be enumerated, so that their mean gradient is exact.
LISTED = ("score", "rloo", "enumerate", "local-expectation")


def check_objective(objective: str | Objective | type[Objective]) -> None:
    """Test that an objective (a word, a class or an instance) satisfies its interface.

    Checked on Bernoulli and Normal sites with every registered estimator: the objective refuses in one line those that
    it does not accept; accepted ones give a finite differentiable scalar, the same for the same seed; all unbiased
    ones among them have the same mean gradient, computed exactly where draws can be enumerated; a KL weight is accepted
    or refused as declared; with ``sums_over_rows`` the mean value of several rows is the sum of theirs; the value has a
    name; and the first call restores the random state and the param store.

    Args:
        objective: the objective to check.

    Returns:
        None.

    Raises:
        AssertionError: at the first fault, with a one-line reason.

    >>> check_objective("iwae")
    """
    target = as_objective(objective)
    who = f"objective {target.name or type(target).__name__!r}"
    require(isinstance(target.name, str) and bool(target.name), who, "must have a name")
    for flag in ("weighs_rows", "takes_estimators", "takes_kl_weight", "runs_model", "sums_over_rows", "learns_model"):
        require(isinstance(getattr(target, flag), bool), who, f"must declare {flag} as a bool")
    _check_kl_weight(target, who)
    served = 0
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        for kind in ("coins", "normal"):
            means: dict[str, Tensor] = {}
            words = list(estimators) if target.takes_estimators else ["default"]
            for word in words:
                served += _check_word(target, kind, word, means, f"{who} on {kind} under {word!r}")
            first = next(iter(means), None)
            for word, mean in means.items():
                close = torch.allclose(mean, means[first], rtol=1e-8, atol=1e-10)  # type: ignore[index]
                require(close, who, f"has another mean gradient under {word!r} than under {first!r}")
    require(served > 0, who, "serves neither Bernoulli nor Normal sites with any estimator")


def _check_kl_weight(target: Objective, who: str) -> None:
    try:
        SiteELBO(objective=target, kl_weight=0.5)
    except BadInput:
        require(not target.takes_kl_weight, who, "refuses a KL weight, though it says that it takes one")
    else:
        require(target.takes_kl_weight, who, "takes a KL weight, though it says that it does not")


def _check_word(target: Objective, kind: str, word: str, means: dict[str, Tensor], who: str) -> int:
    """Whether the objective supports an estimator here; its exact mean gradient is added to ``means``."""
    family = small_programs()[kind]
    model, guide = family.model(), family.guide()
    if not target.learns_model:
        nn.Module.requires_grad_(model, False)
    estimator: Estimator | None = None if word == "default" else estimators[word]()
    site = {"name": "z", "fn": family.site(), "infer": {}, "is_observed": False}
    if estimator is not None and not estimator.supports(site):
        return 0
    accepted = estimator is None or target.accepts(estimator)
    refusal = None if estimator is None else target.refusal(estimator)
    require(accepted == (refusal is None), who, "is accepted and refused at once: accepts and refusal disagree")
    loss = SiteELBO(word, objective=copy.deepcopy(target), num_particles=PARTICLES)(model, guide)
    before = torch.get_rng_state()
    try:
        loss.initialize(ROWS)
    except GumboError as error:
        require("\n" not in str(error), who, "is refused in more than one line")
        require(not accepted or isinstance(error, UnsupportedSite), who, f"fails: {error}")
        return 0
    require(accepted, who, "is served, though the objective does not accept it")
    require(torch.equal(before, torch.get_rng_state()), who, "moves the random stream in the first look")
    both = nn.ModuleList([model, guide] if target.learns_model else [guide])
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        value = loss(ROWS)
        require(value.dim() == 0 and value.requires_grad, who, "does not give a differentiable scalar")
        finite = bool(value.isfinite()) and bool(gradient_of(value, both).isfinite().all())
        require(finite, who, "gives a value or a gradient that is not finite")
        values.append(value.item())
    if estimator is None or not estimator.lazy_parameters:
        require(values[0] == values[1], who, "gives another value for the same seed")
    require(bool(loss.objective_name), who, "has a value without a name")
    if kind == "coins" and word in LISTED:
        means[word] = mean_over_draws(lambda: gradient_of(loss(1), both))
        if target.sums_over_rows and word == "score":
            alone = SiteELBO(word, objective=copy.deepcopy(target), num_particles=1)(model, guide).initialize(2)
            one, several = (mean_over_draws(lambda rows=rows: alone(rows)) for rows in (1, 2))
            require(torch.allclose(several, 2 * one, rtol=1e-8), who, "is no sum over rows, though it says so")
    require(len(pyro.get_param_store()) == 0, who, "leaves something in the param store")
    return 1

"""The contract suite of gradient estimators, on programs with known exact gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from .errors import BadInput, UnsupportedSite
from .inference.auditing.exact import exact_elbo, mean_over_draws
from .inference.elbo import SiteELBO
from .inference.engine.resolution import as_estimator
from .inference.estimators import Estimator
from .inference.estimators._distributions import describe
from .inference.objectives import objectives

F64 = torch.float64
COPIES, CALLS = 2000, 24
TUPLES = 1000  # the most tuples of draws over which a mean gradient is exact
BOUND = 5.0  # standard errors; a correct estimator fails with probability below 2e-5 over some 20 elements


class _Program(PyroModule):
    """A guide or a model over independent copies of one datum, so that one call draws many times."""

    def __init__(self, body: Callable, **parameters: Any):
        super().__init__()
        self.body = body
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=F64)))

    def forward(self, copies: int = 1) -> None:
        with pyro.plate("copies", copies):
            self.body(self)


@dataclass
class _Family:
    """Programs with one kind of site, and their exact bound."""

    site: Callable[[], Any]
    guide: Callable[[], _Program]
    model: Callable[[], _Program]
    bound: Callable[[_Program, _Program], Tensor]


def _observe(loc: Tensor) -> None:
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.4, dtype=F64).expand(loc.shape[-1:]))


def _discrete(fn: Callable[..., Any], start: Any, prior: Tensor, mean: Callable[[_Program, Tensor], Tensor]) -> _Family:
    def sample_guide(self: _Program) -> None:
        pyro.sample("z", fn(self.encoder_logits))

    def sample_model(self: _Program) -> None:
        z = pyro.sample("z", fn(prior))
        _observe(mean(self, z) + torch.zeros(z.shape[: z.dim() - fn(prior).event_dim], dtype=F64))

    return _Family(
        lambda: fn(torch.tensor(start, dtype=F64)),
        lambda: _Program(sample_guide, encoder_logits=start),
        lambda: _Program(sample_model, decoder_w=[0.7, -1.1, 0.4]),
        exact_elbo,
    )


def _normal() -> _Family:
    def q(self: _Program) -> Any:
        return dist.Normal(self.encoder_loc, self.encoder_log_scale.exp())

    def sample_guide(self: _Program) -> None:
        pyro.sample("z", q(self))

    def log_joint(self: _Program, z: Tensor) -> Tensor:
        likelihood = dist.Normal(self.decoder_w[0] * z + 0.3 * z.square(), 1.0)
        return dist.Normal(0.0, 1.0).log_prob(z) + likelihood.log_prob(torch.tensor(0.4, dtype=F64))

    def sample_model(self: _Program) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        _observe(self.decoder_w[0] * z + 0.3 * z.square())

    def bound(model: _Program, guide: _Program) -> Tensor:
        nodes = torch.linspace(-9, 9, 4001, dtype=F64)
        z = guide.encoder_loc + guide.encoder_log_scale.exp() * nodes
        weight = dist.Normal(0.0, 1.0).log_prob(nodes).exp() * (nodes[1] - nodes[0])
        return (weight * (log_joint(model, z) - q(guide).log_prob(z))).sum()

    return _Family(
        lambda: dist.Normal(torch.zeros((), dtype=F64), 1.0),
        lambda: _Program(sample_guide, encoder_loc=0.3, encoder_log_scale=-0.4),
        lambda: _Program(sample_model, decoder_w=[0.7]),
        bound,
    )


def _counts() -> _Family:
    def sample_guide(self: _Program) -> None:
        pyro.sample("z", dist.Poisson(self.encoder_log_rate.exp()))

    def sample_model(self: _Program) -> None:
        z = pyro.sample("z", dist.Poisson(torch.tensor(1.5, dtype=F64)))
        _observe(self.decoder_w[0] * z + torch.zeros(z.shape, dtype=F64))

    def bound(model: _Program, guide: _Program) -> Tensor:
        z = torch.arange(60, dtype=F64)
        log_q = dist.Poisson(guide.encoder_log_rate.exp()).log_prob(z)
        log_p = dist.Poisson(torch.tensor(1.5, dtype=F64)).log_prob(z)
        likelihood = dist.Normal(model.decoder_w[0] * z, 1.0).log_prob(torch.tensor(0.4, dtype=F64))
        return (log_q.exp() * (log_p + likelihood - log_q)).sum()

    return _Family(
        lambda: dist.Poisson(torch.ones((), dtype=F64)),
        lambda: _Program(sample_guide, encoder_log_rate=0.3),
        lambda: _Program(sample_model, decoder_w=[0.5]),
        bound,
    )


def small_programs() -> dict[str, _Family]:
    zeros = torch.zeros
    return {
        "coins": _discrete(
            lambda logits: dist.Bernoulli(logits=logits).to_event(1),
            [0.4, -0.6],
            torch.tensor([0.2, -0.3], dtype=F64),
            lambda self, z: (self.decoder_w[:2] * z).sum(-1) + self.decoder_w[2] * z[..., 0] * z[..., 1],
        ),
        "one-hot": _discrete(
            lambda logits: dist.OneHotCategorical(logits=logits),
            [0.1, -0.4, 0.6],
            zeros(3, dtype=F64),
            lambda self, z: (self.decoder_w * z).sum(-1),
        ),
        "category": _discrete(
            lambda logits: dist.Categorical(logits=logits),
            [0.1, -0.4, 0.6],
            zeros(3, dtype=F64),
            lambda self, z: self.decoder_w[z],
        ),
        "normal": _normal(),
        "counts": _counts(),
    }


def check_estimator(estimator: str | Estimator) -> None:
    """Test that a gradient estimator (a word or an instance) satisfies its interface.

    Checked on small programs with Bernoulli, one-hot, categorical, Normal and Poisson sites:

    - the declarations ``unbiased``, ``needs_relaxed_model``, ``min_particles``, ``evaluations``, ``objectives`` and
      ``log_q`` have valid types and values, and fewer particles than ``min_particles`` are refused;
    - ``supports`` and ``why_not`` agree, and an unsupported site is refused in one line;
    - for a supported site the loss is a finite scalar with a gradient, vectorized over particles and one by one;
    - if it declares itself unbiased for the ELBO, the mean gradient of model and guide is the exact one (enumerated, or
      by quadrature), with the least number of particles and twice as many, at once and one by one: over every tuple of
      draws in training mode if these are at most 1,000, otherwise over 24 calls on 2,000 copies of a datum, within 5
      standard errors;
    - its state does not change without gradients, and survives save and load;
    - its first call restores the random state, and leaves nothing in the param store.

    Args:
        estimator: a word of `gumbo list estimators`, or an instance.

    Returns:
        None.

    Raises:
        AssertionError: at the first fault, with a one-line reason; also if none of these sites is supported.
        UnknownName: an unknown estimator.

    >>> check_estimator("rloo")
    """
    estimator = as_estimator(estimator)
    who = f"estimator {estimator.name!r}"
    _check_declarations(estimator, who)
    objective = "elbo" if "elbo" in estimator.objectives else sorted(estimator.objectives)[0]
    served = 0
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        for kind, family in small_programs().items():
            fn = family.site()
            site = {"name": "z", "fn": fn, "infer": {}, "is_observed": False}
            reason = estimator.why_not(site)
            require(
                estimator.supports(site) == (reason is None), who, f"supports and why_not disagree on {describe(fn)}"
            )
            loss = SiteELBO(estimator, objective=objective)(family.model(), family.guide())
            if reason is not None:
                _check_refused(loss, who, describe(fn))
                continue
            served += 1
            _check_served(estimator, family, objective, f"{who} on {kind}")
    require(served > 0, who, "serves none of Bernoulli, one-hot, categorical, Normal and Poisson sites")


def require(truth: bool, who: str, what: str) -> None:
    if not truth:
        raise AssertionError(f"{who} {what}")


def _check_declarations(estimator: Estimator, who: str) -> None:
    require(isinstance(estimator.unbiased, bool), who, "must declare unbiased as a bool")
    require(isinstance(estimator.needs_relaxed_model, bool), who, "must declare needs_relaxed_model as a bool")
    least = estimator.min_particles
    require(isinstance(least, int) and least >= 1, who, "must declare min_particles as a positive integer")
    runs = estimator.evaluations(least)
    require(isinstance(runs, int) and runs >= 1, who, "must say how many model runs it needs")
    known = set(objectives)
    require(
        bool(estimator.objectives) and estimator.objectives <= known, who, f"must name objectives among {sorted(known)}"
    )
    require(estimator.log_q in ("full", "value", "path"), who, 'must set log_q to "full", "value" or "path"')
    if least > 1:
        try:
            SiteELBO(estimator, num_particles=least - 1)
        except BadInput:
            return
        raise AssertionError(f"{who} takes {least - 1} particles, though it declares at least {least}")


def _check_refused(loss: Any, who: str, kind: str) -> None:
    try:
        loss()
    except UnsupportedSite as error:
        require("\n" not in str(error), who, f"refuses {kind} in more than one line")
    else:
        raise AssertionError(f"{who} serves {kind}, though it says that it does not")


def gradient_of(loss: Tensor, modules: nn.Module) -> Tensor:
    parameters = list(modules.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    zero = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in zero])


def _check_served(estimator: Estimator, family: _Family, objective: str, who: str) -> None:
    model, guide = family.model(), family.guide()
    both = nn.ModuleList([model, guide])
    for vectorize in (True, False):
        # One by one, enumerated sites have joint values over the rows.
        rows = COPIES if vectorize else 1 if estimator.enumerates else 3
        options = {"objective": objective, "vectorize_particles": vectorize}
        loss = SiteELBO(estimator, **options)(model, guide)
        before = torch.get_rng_state()
        loss.initialize(rows)
        require(torch.equal(before, torch.get_rng_state()), who, "moves the random stream in the first call")
        value = loss(rows)
        require(value.dim() == 0 and value.requires_grad, who, "does not give a differentiable scalar")
        require(bool(value.isfinite()), who, "gives a loss that is not finite")
        require(bool(gradient_of(value, both).isfinite().all()), who, "gives a gradient that is not finite")
        _check_state(loss, estimator, options, model, guide, both, who, min(rows, 3))
    exact = estimator.unbiased and objective == "elbo" and estimator.objective_name() == "elbo"
    if exact:
        _check_unbiased(estimator, family, model, guide, both, who)
    require(len(pyro.get_param_store()) == 0, who, "leaves something in the param store")


def _check_state(loss, estimator, options, model, guide, both, who, rows) -> None:
    state = {name: value.clone() for name, value in loss.state_dict().items() if isinstance(value, Tensor)}
    with torch.no_grad():
        loss(rows)
    for name, value in loss.state_dict().items():
        if name in state:
            require(torch.equal(value, state[name]), who, f"moves its state {name!r} though gradients are off")
    other = SiteELBO(estimator, **options)(model, guide).initialize(rows)
    other.load_state_dict(loss.state_dict())
    draws = []
    for module in (loss.eval(), other.eval()):
        torch.manual_seed(1)
        draws.append(gradient_of(module(rows), both))
    loss.train()
    require(torch.equal(*draws), who, "gives another gradient once its state was saved and loaded")


def _check_unbiased(estimator, family, model, guide, both, who) -> None:
    with pyro.get_param_store().scope():
        exact = gradient_of(-family.bound(model, guide), both)
    least = estimator.min_particles
    for particles, vectorize in ((least, True), (2 * least, True), (2 * least, False)):
        options = {"num_particles": particles, "vectorize_particles": vectorize}
        loss = SiteELBO(estimator, **options)(model, guide)
        # A term that a draw shares with the other rows, as a mean over the batch, is large among few of them.
        mean, error = _exact_mean(loss, both, 2 if vectorize else 1), torch.zeros_like(exact)
        if mean is None and vectorize:
            mean, error = _sampled_mean(loss, both)
        if mean is None:
            continue
        # Without variance the difference is rounding error.
        miss = (mean - exact).abs() > BOUND * error + 1e-9 * (1 + exact.abs())
        if miss.any():
            worst = int(((mean - exact).abs() / (error + 1e-12)).argmax())
            how = f"with {particles} particles {'at once' if vectorize else 'one by one'}"
            raise AssertionError(
                f"{who} {how} calls itself unbiased, but gives {mean[worst]:.4g} ± {error[worst]:.2g}"
                f" where {exact[worst]:.4g} is exact"
            )


def _exact_mean(loss: Any, both: nn.Module, rows: int) -> Tensor | None:
    """The mean gradient of a step of training over every tuple of draws; None if these are too many, or not listed."""
    state = copy.deepcopy(loss.initialize(rows).state_dict())
    calls = 0

    def gradient() -> Tensor:
        nonlocal calls
        loss.load_state_dict(state)
        before, calls = torch.get_rng_state(), calls + 1
        found = gradient_of(loss(rows) / rows, both)
        if calls > 1 and not torch.equal(before, torch.get_rng_state()):
            raise UnsupportedSite("z", "enumerate", "it draws noise that is not listed")
        return found

    try:
        return mean_over_draws(gradient, limit=TUPLES)
    except UnsupportedSite:
        return _exact_mean(loss, both, rows - 1) if rows > 1 else None


def _sampled_mean(loss: Any, both: nn.Module) -> tuple[Tensor, Tensor]:
    """The mean gradient of some calls on many copies, and its standard error."""
    loss.initialize(COPIES)
    for _ in range(3):
        loss(COPIES)
    loss.eval()
    draws = torch.stack([gradient_of(loss(COPIES) / COPIES, both) for _ in range(CALLS)])
    return draws.mean(0), draws.std(0) / math.sqrt(CALLS)

"""Twelve Pyro programs that are not the collection's, as users bring them, each with data of its own.

``PROGRAMS`` maps names to a :class:`Own`: the model, its arguments, whether some of its sites are summed out by marks
of the model, and, where there is one, the exact log evidence and the exact mean and standard deviation of each number
of each site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor


@dataclass(frozen=True)
class Own:
    model: Callable
    args: tuple
    summed: bool = False
    vectorizes: bool = True
    funnel: bool = False  # NUTS needs its local sites decentered
    exact: Callable[[], tuple[float, dict[str, tuple[Tensor, Tensor]]]] | None = None


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- 1, mixture


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 5.0)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        which = pyro.sample("which", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(Vindex(locs)[..., which], scale), obs=x)


def _mixture_data() -> tuple:
    g = _generator(1)
    which = torch.bernoulli(torch.full((40,), 0.4), generator=g)
    return (torch.where(which > 0, 1.6, -1.5) + torch.randn(40, generator=g),)


# ---- 2, hierarchical regression


def hierarchical_regression(x, y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(torch.full((2,), -0.7), 0.5).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-0.7, 0.5))
    with pyro.plate("groups", len(x), dim=-2):
        line = pyro.sample("line", dist.Normal(mean, spread).to_event(1))
        with pyro.plate("seen", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(line[..., 0] + line[..., 1] * x, noise), obs=y)


def _regression_data() -> tuple:
    g = _generator(2)
    x = torch.randn(8, 6, generator=g)
    line = torch.tensor([0.5, -0.8]) + 0.6 * torch.randn(8, 1, 2, generator=g)
    return x, line[..., 0] + line[..., 1] * x + 0.5 * torch.randn(8, 6, generator=g)


# ---- 3, hidden Markov model


def hidden_markov(x):
    with pyro.plate("states", 2):
        rows = pyro.sample("rows", dist.Dirichlet(torch.tensor([[6.0, 2.0], [2.0, 6.0]])))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.5, 1.5]), 0.7))
    state = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        state = pyro.sample(
            f"state_{t}", dist.Categorical(Vindex(rows)[..., state, :]), infer={"enumerate": "parallel"}
        )
        pyro.sample(f"x_{t}", dist.Normal(Vindex(locs)[..., state], 1.0), obs=x[t])


def _markov_data() -> tuple:
    g = _generator(3)
    state, states = 0, []
    for _ in range(16):
        state = state if torch.rand((), generator=g) < 0.8 else 1 - state
        states.append(state)
    return (2.0 * torch.tensor(states) - 1.0 + torch.randn(16, generator=g),)


# ---- 4, factor model


LOADINGS = torch.tensor([[1.0, 0.5], [0.3, -1.0], [0.8, 0.9], [-0.5, 1.2], [0.2, 0.4]])


def factor_model(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, 0.7).to_event(1), obs=x)


def _factor_data() -> tuple:
    g = _generator(4)
    return (torch.randn(30, 2, generator=g) @ LOADINGS.T + 0.7 * torch.randn(30, 5, generator=g),)


def _factor_exact():
    (x,) = FACTOR
    covariance = LOADINGS @ LOADINGS.T + 0.49 * torch.eye(5)
    posterior = (torch.eye(2) + LOADINGS.T @ LOADINGS / 0.49).inverse()
    mean = x @ LOADINGS @ posterior / 0.49
    evidence = dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(x).sum()
    return float(evidence), {"z": (mean, posterior.diagonal().sqrt().expand(mean.shape))}


FACTOR = _factor_data()


# ---- 5, item response


def item_response(y):
    items, people = pyro.plate("items", y.shape[1], dim=-1), pyro.plate("people", len(y), dim=-2)
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with people:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with items, people:
        pyro.sample("y", dist.Bernoulli(logits=ability - difficulty), obs=y)


def _response_data() -> tuple:
    g = _generator(5)
    logits = torch.randn(20, 1, generator=g) - torch.randn(1, 6, generator=g)
    return (torch.bernoulli(logits.sigmoid(), generator=g),)


# ---- 6, topic model


TOPICS = torch.full((2, 6), 0.5) + 4.0 * torch.repeat_interleave(torch.eye(2), 3, 1)


def topic_model(words):
    with pyro.plate("topics", 2):
        topics = pyro.sample("topic", dist.Dirichlet(TOPICS))
    with pyro.plate("documents", len(words), dim=-2):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", words.shape[1], dim=-1):
            pyro.sample("word", dist.Categorical(shares @ topics), obs=words)


def _topic_data() -> tuple:
    g = _generator(6)
    shares = torch.rand(12, 1, generator=g)
    topics = TOPICS / TOPICS.sum(-1, keepdim=True)
    return (torch.multinomial(shares * topics[0] + (1 - shares) * topics[1], 15, replacement=True, generator=g),)


# ---- 7, counts with zero inflation


def zero_inflated_counts(x, y):
    gate = pyro.sample("gate", dist.Beta(2.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        open_ = pyro.sample("open", dist.Bernoulli(1.0 - gate), infer={"enumerate": "parallel"})
        rate = (slope[..., 0] + slope[..., 1] * x).clamp(max=8.0).exp()
        pyro.sample("y", dist.Poisson(open_ * rate + (1.0 - open_) * 1e-6), obs=y)


def _count_data() -> tuple:
    g = _generator(7)
    x = torch.randn(40, generator=g)
    gate = torch.bernoulli(torch.full((40,), 0.6), generator=g)
    return x, gate * torch.poisson((0.8 + 0.5 * x).exp(), generator=g)


# ---- 8, nested plates


def nested_plates(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.LogNormal(torch.full((2,), -0.5), 0.4).to_event(1))
    with pyro.plate("schools", y.shape[0], dim=-3):
        school = pyro.sample("school", dist.Normal(mean, spread[..., 0]))
        with pyro.plate("classes", y.shape[1], dim=-2):
            room = pyro.sample("room", dist.Normal(school, spread[..., 1]))
            with pyro.plate("pupils", y.shape[2], dim=-1):
                pyro.sample("y", dist.Normal(room, 0.8), obs=y)


def _nested_data() -> tuple:
    g = _generator(8)
    rooms = 1.0 + 0.7 * torch.randn(5, 1, 1, generator=g) + 0.5 * torch.randn(5, 3, 1, generator=g)
    return (rooms + 0.8 * torch.randn(5, 3, 4, generator=g),)


# ---- 9, missing data


def missing_data(x, seen):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        filled = z @ LOADINGS.T
        for column in range(x.shape[1]):
            with pyro.poutine.mask(mask=seen[:, column]):
                pyro.sample(f"x_{column}", dist.Normal(filled[..., column], 0.7), obs=x[:, column])


def _missing_data() -> tuple:
    g = _generator(9)
    x = torch.randn(30, 2, generator=g) @ LOADINGS.T + 0.7 * torch.randn(30, 5, generator=g)
    seen = torch.rand(30, 5, generator=g) < 0.7
    return torch.where(seen, x, 0.0), seen


def _missing_exact():
    x, seen = MISSING
    evidence, means, scales = 0.0, [], []
    for row, there in zip(x, seen, strict=True):
        loadings = LOADINGS[there]
        posterior = (torch.eye(2) + loadings.T @ loadings / 0.49).inverse()
        means.append(posterior @ loadings.T @ row[there] / 0.49)
        scales.append(posterior.diagonal().sqrt())
        if there.any():
            covariance = loadings @ loadings.T + 0.49 * torch.eye(int(there.sum()))
            evidence += float(dist.MultivariateNormal(torch.zeros(len(covariance)), covariance).log_prob(row[there]))
    return evidence, {"z": (torch.stack(means), torch.stack(scales))}


MISSING = _missing_data()


# ---- 10, state-space model


STEPS, KEPT, DRIFT, NOISE = 12, 0.9, 0.4, 0.8


def state_space(x):
    z = torch.zeros(())
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Normal(KEPT * z, DRIFT))
        pyro.sample(f"x_{t}", dist.Normal(z, NOISE), obs=x[t])


def _state_data() -> tuple:
    g = _generator(10)
    z, x = torch.zeros(()), []
    for _ in range(STEPS):
        z = KEPT * z + DRIFT * torch.randn((), generator=g)
        x.append(z + NOISE * torch.randn((), generator=g))
    return (torch.stack(x),)


def _state_exact():
    (x,) = STATE
    covariance = torch.zeros(STEPS, STEPS, dtype=torch.float64)
    variance = 0.0
    for t in range(STEPS):
        variance = KEPT**2 * variance + DRIFT**2
        for later in range(t, STEPS):
            covariance[t, later] = covariance[later, t] = KEPT ** (later - t) * variance
    return gaussian_posterior(
        covariance, torch.eye(STEPS).double(), NOISE, x.double(), [f"z_{t}" for t in range(STEPS)]
    )


def gaussian_posterior(prior: Tensor, loadings: Tensor, noise: float, x: Tensor, names: list[str]):
    """Evidence, and mean and standard deviation of each of some scalar sites, of x = loadings z + noise."""
    marginal = loadings @ prior @ loadings.T + noise**2 * torch.eye(len(x)).double()
    evidence = dist.MultivariateNormal(torch.zeros(len(x)).double(), marginal).log_prob(x)
    gain = prior @ loadings.T @ marginal.inverse()
    mean, covariance = gain @ x, prior - gain @ loadings @ prior
    scale = covariance.diagonal().sqrt()
    return float(evidence), {name: (mean[place].float(), scale[place].float()) for place, name in enumerate(names)}


STATE = _state_data()


# ---- 11, global and local latents


def global_and_local(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.LogNormal(-0.7, 0.5))
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(mean, spread))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def _global_data() -> tuple:
    g = _generator(11)
    return (torch.poisson((0.8 + 0.5 * torch.randn(25, generator=g)).exp(), generator=g),)


# ---- 12, control flow that changes parameters


def control_flow(x):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    scale = 0.6 if shift.item() > 0.5 else 1.2
    slope = pyro.sample("slope", dist.Normal(0.0, scale))
    pyro.sample("x", dist.Normal(shift + slope * torch.linspace(-1, 1, len(x)), 1.0).to_event(1), obs=x)


def _flow_data() -> tuple:
    g = _generator(12)
    return (0.6 + 0.7 * torch.linspace(-1, 1, 10) + torch.randn(10, generator=g),)


def _flow_exact():
    """By quadrature over both sites."""
    (x,) = FLOW
    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    shift, slope = grid.unsqueeze(1), grid.unsqueeze(0)
    scale = torch.where(shift > 0.5, 0.6, 1.2).double()
    design = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    log_p = dist.Normal(0.0, 1.0).log_prob(shift) + dist.Normal(0.0, scale).log_prob(slope)
    for place, value in zip(design, x.double(), strict=True):
        log_p = log_p + dist.Normal(shift + slope * place, 1.0).log_prob(value)
    step = float(grid[1] - grid[0])
    evidence = log_p.flatten().logsumexp(0) + 2 * math.log(step)
    weight = (log_p - log_p.flatten().logsumexp(0)).exp()
    moments = {}
    for name, axis in (("shift", 1), ("slope", 0)):
        one = weight.sum(axis)
        mean = (one * grid).sum()
        moments[name] = mean.float(), ((one * grid.square()).sum() - mean.square()).sqrt().float()
    return float(evidence), moments


FLOW = _flow_data()


PROGRAMS: dict[str, Own] = {
    "mixture": Own(mixture, _mixture_data(), summed=True, vectorizes=False),
    "hierarchical regression": Own(hierarchical_regression, _regression_data()),
    "hidden Markov": Own(hidden_markov, _markov_data(), summed=True, vectorizes=False),
    "factor model": Own(factor_model, FACTOR, exact=_factor_exact),
    "item response": Own(item_response, _response_data()),
    "topic model": Own(topic_model, _topic_data()),
    "zero-inflated counts": Own(zero_inflated_counts, _count_data(), summed=True),
    "nested plates": Own(nested_plates, _nested_data()),
    "missing data": Own(missing_data, MISSING, exact=_missing_exact),
    "state space": Own(state_space, STATE, exact=_state_exact),
    "global and local": Own(global_and_local, _global_data(), funnel=True),
    "control flow": Own(control_flow, FLOW, vectorizes=False, exact=_flow_exact),
}

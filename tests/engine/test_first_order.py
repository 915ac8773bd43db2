"""Second derivatives of the loss: right, or refused in one line."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from gumbo.errors import BadInput, GumboError
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import estimators

OBSERVED, PRIOR = torch.tensor(1.0), 0.4


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logit, self.loc, self.log_scale = (nn.Parameter(torch.tensor(value)) for value in (0.3, 0.5, -0.3))

    def forward(self):
        pyro.sample("y", dist.Bernoulli(logits=self.logit))
        pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.2))

    def forward(self):
        y = pyro.sample("y", dist.Bernoulli(PRIOR))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(self.shift + z + 2 * y, 1.0), obs=OBSERVED)


def exact(logit, loc, log_scale, shift):
    q, sd = logit.sigmoid(), log_scale.exp()
    kl = q * (q / PRIOR).log() + (1 - q) * ((1 - q) / (1 - PRIOR)).log() + 0.5 * (sd**2 + loc**2 - 1) - log_scale
    squares = sum(w * ((OBSERVED - shift - loc - 2 * y) ** 2 + sd**2) for w, y in ((q, 1.0), (1 - q, 0.0)))
    return 0.5 * math.log(2 * math.pi) + 0.5 * squares + kl


def made(y, z, **options):
    with torch.random.fork_rng():
        model, guide = Model(), Guide()
        loss = SiteELBO({"y": y, "z": z}, **options)(model, guide)
        loss.initialize()
    return loss, [guide.logit, guide.loc, guide.log_scale, model.shift]


def hessian(loss, parameters):
    slopes = torch.autograd.grad(loss(), parameters, create_graph=True)
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in slopes]
    return torch.stack([torch.stack([torch.zeros(()) if one is None else one for one in row]) for row in rows])


def words_of_first_order():
    """Words that differentiate log q neither as it is nor with a draw as a function of it."""
    return [name for name, make in estimators.items() if make().log_q != "full" or make().together]


def test_second_derivatives_of_paths_and_sums_are_exact_in_the_mean():
    loss, parameters = made("enumerate", "pathwise")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = torch.stack([hessian(loss, parameters) for _ in range(400)]).double()
    truth = torch.autograd.functional.hessian(lambda x: exact(*x), torch.tensor([0.3, 0.5, -0.3, 0.2]).double())
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - truth).abs() <= 4 * error + 1e-5).all()


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("site", ["y", "z"])
@pytest.mark.parametrize("word", words_of_first_order())
def test_other_words_refuse_second_derivatives(word, site, objective):
    words = {"y": "enumerate" if objective == "elbo" else "score", "z": "pathwise"} | {site: word}
    try:
        loss, parameters = made(**words, objective=objective, num_particles=2)
    except GumboError:
        pytest.skip(f"{word} does not serve {site} under {objective}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(BadInput, match="first derivatives only"):
            hessian(loss, parameters)
        # The model alone, whose derivatives at given draws are all right, is differentiated as often as one likes.
        slope = torch.autograd.grad(loss(), parameters[-1], create_graph=True)[0]
        if estimators[word]().takes_slope:
            return
        (second,) = torch.autograd.grad(slope, parameters[-1])
    if objective == "elbo":
        torch.testing.assert_close(second, torch.ones(()))


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("site", ["y", "z"])
@pytest.mark.parametrize("word", words_of_first_order())
def test_a_mixed_second_derivative_alone_is_refused_too(word, site, objective):
    """A slope of the model changes with a parameter of the draws, although its graph may not lead there."""
    words = {"y": "enumerate" if objective == "elbo" else "score", "z": "pathwise"} | {site: word}
    try:
        loss, (logit, loc, _, shift) = made(**words, objective=objective, num_particles=2)
    except GumboError:
        pytest.skip(f"{word} does not serve {site} under {objective}")
    own = logit if site == "y" else loc
    for first, second in ((shift, own), (own, shift)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            (slope,) = torch.autograd.grad(loss(), first, create_graph=True)
        if estimators[word]().log_q == "path" and not estimators[word]().together:  # the draw leads there
            torch.testing.assert_close(torch.autograd.grad(slope, second)[0], torch.ones(()))
            continue
        with pytest.raises(BadInput, match="first derivatives only"):
            torch.autograd.grad(slope, second, allow_unused=True)


class Coin(PyroModule):
    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.3))

    def forward(self):
        pyro.sample("y", dist.Bernoulli(logits=self.logit))


class Seen(PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.2))

    def forward(self):
        y = pyro.sample("y", dist.Bernoulli(PRIOR))
        pyro.sample("x", dist.Normal(self.slope * (1 + y), 1.0), obs=OBSERVED)


@pytest.mark.parametrize("word", ["double-cv", "rodeo"])
def test_a_gradient_that_was_found_ahead_is_not_a_constant(word):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, guide = Seen(), Coin()
        loss = SiteELBO(word, num_particles=3)(model, guide)
        loss.initialize()
        for parameter in (model.slope, guide.logit):
            (slope,) = torch.autograd.grad(loss(), parameter, create_graph=True)
            with pytest.raises(BadInput, match="first derivatives only"):
                torch.autograd.grad(slope, parameter, allow_unused=True)

"""SiteELBO on programs as strangers write them: each against the answer that is known for it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from stranger_programs import CLOSED, EXACT, REFUSED, SAME, STOCK, BranchOnALatent, PlateThatParticlesMisfit
from ztest import misses

from gumbo.errors import BadInput, GumboError, GumboWarning
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import exact_elbo, mean_over_draws


def each(table):
    """One test per program and word, named after both."""
    cases = [(name, word) for name, entry in table.items() for word in entry.words]
    ids = [f"{name}-{word if isinstance(word, str) else '+'.join(word.values())}" for name, word in cases]
    return pytest.mark.parametrize(("name", "word"), cases, ids=ids)


@pytest.mark.filterwarnings("ignore:the guide's site 's'")  # its coin that the latents do not determine
@each(EXACT)
def test_the_mean_over_every_draw_is_the_exact_gradient(name, word, param_store):
    entry = EXACT[name]
    pair = entry.make()
    exact = -exact_elbo(pair.model, pair.guide)
    loss = SiteELBO(word, **entry.options)
    found = mean_over_draws(lambda: with_gradient(loss.differentiable_loss(pair.model, pair.guide), pair))
    assert torch.allclose(found, with_gradient(exact, pair), rtol=0, atol=1e-10)


def with_gradient(value, pair):
    stored = pyro.get_param_store()._params.items()
    parameters = [*pair.parameters(), *[p for name, p in stored if p.requires_grad and not name.startswith("gumbo.")]]
    mine = {id(p): p for p in parameters}.values()
    found = torch.autograd.grad(value, list(mine), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(mine, found, strict=True)]
    return torch.cat([value.detach().reshape(1), *[part.flatten() for part in parts]])


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", STOCK)
def test_reparameterized_programs_have_the_numbers_of_trace_elbo(name, num_particles, param_store):
    entry = STOCK[name]
    together = entry.options.get("vectorize_particles", True)
    pair = entry.make()
    # Where the nesting is not given, Pyro's first run to find it takes numbers from the stream.
    options = {"num_particles": num_particles, "vectorize_particles": together, "max_plate_nesting": 2}
    ours, theirs = SiteELBO(**options), Trace_ELBO(**options)
    found = []
    for elbo in (ours, theirs):
        pyro.set_rng_seed(7)
        found.append(with_gradient(elbo.differentiable_loss(pair.model, pair.guide), pair))
    assert len(found[0]) > 1
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-11)


@each(CLOSED)
def test_the_mean_is_the_closed_form(name, word, param_store):
    entry = CLOSED[name]
    pair = entry.make()
    exact = with_gradient(pair.truth(), pair)
    loss = SiteELBO(word, num_particles=pair.particles, **entry.options)
    draws = [with_gradient(loss.differentiable_loss(pair.model, pair.guide), pair) for _ in range(pair.calls)]
    assert not misses(torch.stack(draws), exact, pair.resolves)


@each(SAME)
def test_two_ways_to_write_one_program_give_one_number(name, word, param_store):
    pair = SAME[name].make()
    found = []
    for own, model, guide in ((pair, pair.model, pair.guide), pair.same()):
        pyro.set_rng_seed(7)
        loss = SiteELBO(word, num_particles=2)
        found.append(with_gradient(loss.differentiable_loss(model, guide), own))
    assert torch.allclose(found[0], found[1], rtol=1e-12, atol=1e-13)


@each(REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(name, word, param_store):
    entry = REFUSED[name]
    pair = entry.make()
    with pytest.raises(GumboError, match=entry.says) as caught:
        SiteELBO(word, **entry.options).differentiable_loss(pair.model, pair.guide)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(6))
def test_a_word_may_name_a_site_of_a_branch_that_the_first_run_does_not_take(seed, param_store):
    pair = BranchOnALatent()
    pyro.set_rng_seed(seed)
    loss = SiteELBO({"z": "score", "y": "rloo"}, num_particles=2, vectorize_particles=False)
    for _ in range(4):
        assert loss.differentiable_loss(pair.model, pair.guide).isfinite()
    with pytest.raises(BadInput, match="name a site 'w' that the guide does not sample"):
        SiteELBO({"w": "score"}).loss(pair.model, pair.guide)


def test_where_particles_do_not_fit_a_plate_they_run_one_by_one(param_store):
    pair = PlateThatParticlesMisfit()
    exact = -exact_elbo(pair.model, pair.guide)
    loss = SiteELBO("score", num_particles=2)
    with pytest.warns(GumboWarning, match="does not vectorize.*one by one"):
        loss.differentiable_loss(pair.model, pair.guide)
    found = mean_over_draws(lambda: with_gradient(loss.differentiable_loss(pair.model, pair.guide), pair))
    assert torch.allclose(found, with_gradient(exact, pair), rtol=0, atol=1e-10)


@pytest.mark.parametrize("vectorize", [None, True, False])
@pytest.mark.parametrize("objective", ["elbo", "iwae", "renyi", "rws", "log-variance+elbo", "free-bits"])
def test_a_program_without_latents_is_a_likelihood(objective, vectorize, param_store):
    def model():
        with pyro.plate("data", 2):
            loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.3, 0.4], dtype=torch.float64))

    loss = SiteELBO(objective=objective, num_particles=2, vectorize_particles=vectorize)
    loss.loss_and_grads(model, lambda: None)
    assert pyro.param("loc").grad.item() == pytest.approx(-0.1)


def test_there_are_sixty_programs():
    assert sum(map(len, (EXACT, STOCK, CLOSED, SAME, REFUSED))) >= 60

"""Gapped straight-through: the path that its algorithm says, and what it promises of it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import F64, Params, X
from torch.nn.functional import relu

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import GappedStraightThrough

LOGITS = torch.tensor([0.3, -0.9, 1.2, 0.1], dtype=F64)
WEIGHTS = torch.tensor([0.7, -1.1, 0.4, 2.0], dtype=F64)


@pytest.mark.parametrize("temperature, gap", [(1.0, 1.0), (0.5, 0.0), (1.3, 2.5)])
def test_it_follows_its_algorithm_written_out_with_detached_pieces(temperature, gap):
    """Fan et al. 2022, algorithm 1: m₁ = (max θ − θ·D) D and m₂ = (θ + gap − max θ)₊ (1 − D), then straight-through."""
    a = LOGITS.clone().requires_grad_()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        fn = dist.OneHotCategorical(logits=a)
        draw = GappedStraightThrough(temperature, gap).draw(fn, 0).value
        (found,) = torch.autograd.grad((WEIGHTS * draw).sum(), a, retain_graph=True)
        hard, logits = draw.detach(), fn.logits
        assert set(hard.tolist()) == {0.0, 1.0}
        raised = (logits.max() - (logits * hard).sum()).detach() * hard
        lowered = relu(logits + gap - logits.max()).detach() * (1 - hard)
        shifted = logits + raised - lowered
        assert (shifted * hard).sum() >= shifted.max() - 1e-12  # with a gap of 0 the next one is level with it
        rest = shifted[hard == 0].max()
        assert (shifted * hard).sum() - rest >= gap - 1e-12
        (expected,) = torch.autograd.grad((WEIGHTS * (shifted / temperature).softmax(-1)).sum(), a)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        seen.add(int(hard.argmax()))
    assert len(seen) > 2


def test_given_the_draw_its_path_has_no_variance():
    a = LOGITS.expand(4000, 4).clone().requires_grad_()
    draw = GappedStraightThrough().draw(dist.OneHotCategorical(logits=a), 0).value
    (found,) = torch.autograd.grad((WEIGHTS * draw).sum(), a)
    for k in range(4):
        rows = found[draw.detach()[:, k] == 1]
        assert len(rows) > 100 and torch.allclose(rows, rows[:1].expand_as(rows), rtol=0, atol=1e-12)


def test_draws_follow_the_probabilities():
    """40,000 draws: a frequency is within 5 standard errors of its probability."""
    size = 40_000
    draw = GappedStraightThrough().draw(dist.OneHotCategorical(logits=LOGITS.expand(size, 4)), 0).value
    p = LOGITS.softmax(-1)
    assert ((draw.mean(0) - p).abs() < 5 * (p * (1 - p) / size).sqrt()).all()


class Guide(Params):
    """Two one-hot sites, the second masked for some rows, in a subsampled plate."""

    def __init__(self):
        super().__init__(a=[[0.4, -0.7, 0.0], [0.1, 0.3, 0.2]], b=[[0.0, 1.0, 0.0], [0.2, 0.0, 0.1], [0.5, 0.5, 0.0]])

    def forward(self):
        with pyro.plate("data", 8, subsample_size=2):
            z = pyro.sample("z", dist.OneHotCategorical(logits=self.a))
            with pyro.poutine.mask(mask=torch.tensor([True, False])):
                pyro.sample("y", dist.OneHotCategorical(logits=z @ self.b))


def model():
    with pyro.plate("data", 8, subsample_size=2):
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
        with pyro.poutine.mask(mask=torch.tensor([True, False])):
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
        pyro.sample("x", dist.Normal(z[..., 0] + y[..., 1], 1.0), obs=X)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 1e-6])
def test_the_value_is_the_discrete_bound_and_the_gradient_is_finite(vectorize, temperature):
    guide = Guide()
    loss = SiteELBO(GappedStraightThrough(temperature), num_particles=3, vectorize_particles=vectorize)(model, guide)
    for _ in range(3):
        loss().backward()
    assert loss.objective_name == "elbo"
    assert all(p.grad.isfinite().all() for p in guide.parameters())
    assert temperature < 1 or all(p.grad.abs().max() > 0 for p in guide.parameters())


def test_what_is_refused():
    def coin():
        pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(UnsupportedSite, match="OneHotCategorical"):
        SiteELBO("gapped-straight-through")(coin, coin)()
    for options in ({"gap": -1.0}, {"temperature": 0.0}):
        with pytest.raises(BadInput, match=next(iter(options))):
            GappedStraightThrough(**options)

"""The importance-weighted objectives against exact bounds, and their gradients against exact gradients."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import DISCRETE, F64, Params, PlateGuide, PlateModel, X, gradient
from pyro.nn import PyroModule
from torch import nn

from gumbo.errors import BadInput, UnknownName, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import exact_iwae, mean_over_draws
from gumbo.inference.objectives._weights import Bound

SCORES = ["score", "score-average", "nvil", "rloo"]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [2, 3])
@pytest.mark.parametrize("word", SCORES)
@pytest.mark.parametrize("name", ["one coin", "chain"])
def test_score_gradients_of_the_importance_weighted_bound_are_exact_on_average(name, word, num_particles, vectorize):
    if name == "chain" and num_particles == 3 and not vectorize:
        num_particles = 2
    model, guide = DISCRETE[name].make()
    both = nn.ModuleList([model, guide])
    with pyro.get_param_store().scope():
        exact = gradient(-exact_iwae(model, guide, num_particles=num_particles), both)
        bound = -exact_iwae(model, guide, num_particles=num_particles)
    loss = SiteELBO(word, objective="iwae", num_particles=num_particles, vectorize_particles=vectorize)(model, guide)
    for _ in range(3):
        loss()
    loss.eval()
    assert loss.objective_name == "iwae"
    assert torch.allclose(mean_over_draws(lambda: gradient(loss(), both)), exact, rtol=0, atol=1e-10)
    assert torch.allclose(mean_over_draws(loss), bound, rtol=0, atol=1e-10)


class _Coin(Params):
    """One row of the plate programs, alone."""

    def __init__(self, row, parameter, model):
        super().__init__()
        self.row, self.is_model, self.parameter = row, model, [parameter]

    def forward(self):
        if not self.is_model:
            pyro.sample("z", dist.Bernoulli(logits=self.parameter[0][self.row]))
            return
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        pyro.sample("x", dist.Normal(self.parameter[0] * z, 1.0), obs=X[self.row])


@pytest.mark.parametrize("word", SCORES)
def test_weights_are_formed_per_datum(word):
    model, guide = PlateModel(), PlateGuide()
    both = nn.ModuleList([model, guide])
    rows = [exact_iwae(_Coin(i, model.w, True), _Coin(i, guide.a, False), num_particles=2) for i in range(2)]
    exact = gradient(-sum(rows), both)
    loss = SiteELBO(word, objective="iwae", num_particles=2)(model, guide)
    loss.initialize().eval()
    assert torch.allclose(mean_over_draws(lambda: gradient(loss(), both)), exact, rtol=0, atol=1e-10)
    assert torch.allclose(mean_over_draws(loss), -sum(rows), rtol=0, atol=1e-10)


def subsampled_model(x, size):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0)) if size == "global" else 0.3
    with pyro.plate("data", 6, subsample_size=2) as rows:
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3, dtype=F64)))
        pyro.sample("x", dist.Normal(z + mean, 1.0), obs=x[rows])


def subsampled_guide(x, size):
    if size == "global":
        pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=2):
        pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.4, dtype=F64)))


def test_a_minibatch_bound_estimates_the_full_one():
    """Averaged over all minibatches and draws, the scaled bound of two rows is the bound of all six."""
    x = torch.linspace(-1, 1.5, 6, dtype=F64)

    def row_model(value):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        pyro.sample("x", dist.Normal(z + 0.3, 1.0), obs=value)

    def row_guide(value):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.4, dtype=F64)))

    full = sum(exact_iwae(row_model, row_guide, value, num_particles=2) for value in x)
    elbo = SiteELBO("score", objective="iwae", num_particles=2)
    draws = torch.stack([-elbo.differentiable_loss(subsampled_model, subsampled_guide, x, None) for _ in range(800)])
    z = (draws.mean() - full) / (draws.std() / math.sqrt(len(draws)))
    assert abs(z) < 4
    # What a bound over two rows, unscaled weights and all, would be instead is far away.
    assert abs((full / 3 - full) / (draws.std() / math.sqrt(len(draws)))) > 20


@pytest.mark.parametrize("scale", [0.5, torch.tensor(1.0, dtype=F64)])
@pytest.mark.parametrize("options", [{"objective": "iwae"}, {"objective": "renyi", "alpha": 0.5}])
def test_the_factor_of_a_subsampled_plate_is_no_exponent_where_other_scales_differ(options, scale):
    """The minibatch has the value of a plate in full with the same rows, times N/B."""
    x = torch.linspace(-1, 1.5, 6, dtype=F64)
    draws = dist.Bernoulli(torch.full((2,), 0.4, dtype=F64))

    def programs(part):
        def plate():
            return pyro.plate("data", 6, subsample=torch.tensor([1, 4])) if part else pyro.plate("data", 2)

        def model():
            with plate():
                z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3, dtype=F64)))
                with pyro.poutine.scale(scale=scale):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x[[1, 4]])

        def guide():
            with plate():
                pyro.sample("z", draws)

        return model, guide

    values = []
    for part in (True, False):
        loss = SiteELBO("score", num_particles=2, **options)(*programs(part))
        loss()
        torch.manual_seed(5)
        values.append(loss())
    assert torch.allclose(values[0], 3 * values[1], rtol=1e-12)


def test_a_latent_outside_the_subsampled_plate_is_refused():
    x = torch.linspace(-1, 1.5, 6, dtype=F64)
    with pytest.raises(UnsupportedSite, match="'mean'.*subsampled plate 'data'"):
        SiteELBO({"mean": "pathwise", "z": "score"}, objective="iwae", num_particles=2).loss(
            subsampled_model, subsampled_guide, x, "global"
        )


class HierarchyGuide(Params):
    """Two Normal layers, one of which leans on the other, over independent copies of one datum."""

    def __init__(self):
        super().__init__(a=0.2, s=-0.3, b=0.6, t=-0.1)

    def forward(self, copies=1):
        with pyro.plate("copies", copies):
            z1 = pyro.sample("z1", dist.Normal(self.a, self.s.exp()))
            pyro.sample("z2", dist.Normal(self.b * z1, self.t.exp()))


class HierarchyModel(Params):
    def __init__(self):
        super().__init__(w=0.8)

    def forward(self, copies=1):
        with pyro.plate("copies", copies):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.w * z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=X[0].expand(copies))


def quadrature_iwae(model, guide, nodes=24):
    """The K = 2 bound of the hierarchy by Gauss–Hermite quadrature over its four standard Normals."""
    import numpy

    points, weights = numpy.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.tensor(points), torch.tensor(weights / weights.sum())
    e1, e2 = torch.meshgrid(points, points, indexing="ij")
    z1 = guide.a + guide.s.exp() * e1
    z2 = guide.b * z1 + guide.t.exp() * e2
    log_w = (
        dist.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(z1)
        + dist.Normal(model.w * z1, 1.0).log_prob(z2)
        + dist.Normal(z1 + z2, 1.0).log_prob(X[0])
        - dist.Normal(guide.a, guide.s.exp()).log_prob(z1)
        - dist.Normal(guide.b * z1, guide.t.exp()).log_prob(z2)
    ).flatten()
    both = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    weight = (weights[:, None] * weights[None, :]).flatten()
    return (weight[:, None] * weight[None, :] * both).sum()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("word", ["pathwise", "dreg"])
def test_continuous_gradients_of_the_importance_weighted_bound(word, vectorize):
    """z-tests against quadrature: 5 elements, |z| < 4.5 each, so a family-wise error rate below 4e-5.

    30,000 draws see a bias of a fifteenth of the standard deviation of one draw with probability above 0.999.
    """
    model, guide = HierarchyModel(), HierarchyGuide()
    both = nn.ModuleList([model, guide])
    exact = gradient(-quadrature_iwae(model, guide), both)
    loss = SiteELBO(word, objective="iwae", num_particles=2, vectorize_particles=vectorize)(model, guide)
    torch.manual_seed(1)
    draws = torch.stack([gradient(loss(500) / 500, both) for _ in range(60)])
    z = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 4.5


def test_dreg_keeps_the_models_gradient_of_a_shared_parameter():
    """One mean for model and guide: 1 element, |z| < 4.5."""

    class Shared(Params):
        def __init__(self):
            super().__init__(m=0.4, s=-0.3)

        def forward(self, copies, is_model):
            with pyro.plate("copies", copies):
                scale = torch.ones((), dtype=F64) if is_model else self.s.exp()
                z = pyro.sample("z", dist.Normal(2 * self.m if is_model else self.m, scale))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=X[0].expand(copies))

    class Guide(PyroModule):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, copies):
            self.shared(copies, False)

    class Model(Guide):
        def forward(self, copies):
            self.shared(copies, True)

    shared = Shared()
    losses = {
        w: SiteELBO(w, objective="iwae", num_particles=2)(Model(shared), Guide(shared)) for w in ("pathwise", "dreg")
    }
    torch.manual_seed(3)
    draws = {w: torch.stack([gradient(loss(500) / 500, shared) for _ in range(60)]) for w, loss in losses.items()}
    gap = draws["dreg"].mean(0) - draws["pathwise"].mean(0)
    error = ((draws["dreg"].var(0) + draws["pathwise"].var(0)) / 60).sqrt()
    assert (gap / error).abs().max() < 4.5


@pytest.mark.parametrize("how", ["method", "closure", "argument"])
def test_dreg_has_the_same_gradient_however_the_guide_gets_its_parameters(how):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (0.2, 0.6))

        def forward(self, a=None):
            z1 = pyro.sample("z1", dist.Normal(self.a if a is None else a, 0.7))
            pyro.sample("z2", dist.Normal(self.b * z1, 0.9))

    network = Network()

    def model(a=None):
        z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=X[0])

    guides = {"method": network.forward, "closure": lambda: network(), "argument": lambda a: network(a)}
    found = []
    for guide, args in ((network, ()), (guides[how], (2 * network.a - network.a,) if how == "argument" else ())):
        loss = SiteELBO("dreg", objective="iwae", num_particles=3)(model, guide)
        loss(*args)
        torch.manual_seed(4)
        found.append(gradient(loss(*args), network))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


def test_dreg_keeps_the_gradient_of_what_the_guide_hands_to_the_model():
    """A tensor that is no draw, kept on the guide: 1 element, |z| < 4.5."""

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Parameter(torch.tensor(0.3, dtype=F64))

        def forward(self, copies):
            self.shift = 2 * self.m
            with pyro.plate("copies", copies):
                pyro.sample("z", dist.Normal(self.m, 1.0))

    guide = Guide()

    def model(copies):
        with pyro.plate("copies", copies):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z + guide.shift, 1.0), obs=X[0].expand(copies))

    draws = {}
    for word in ("pathwise", "dreg"):
        loss = SiteELBO(word, objective="iwae", num_particles=2)(model, guide)
        torch.manual_seed(6)
        draws[word] = torch.stack([gradient(loss(500) / 500, guide) for _ in range(60)])
    gap = draws["dreg"].mean(0) - draws["pathwise"].mean(0)
    error = ((draws["dreg"].var(0) + draws["pathwise"].var(0)) / 60).sqrt()
    assert (gap / error).abs().max() < 4.5


def test_dreg_has_less_variance_than_pathwise_for_the_guide():
    model, guide = HierarchyModel(), HierarchyGuide()
    variance = {}
    for word in ("pathwise", "dreg"):
        loss = SiteELBO(word, objective="iwae", num_particles=16)(model, guide)
        torch.manual_seed(2)
        variance[word] = torch.stack([gradient(loss(50), guide) for _ in range(40)]).var(0).sum()
    assert variance["dreg"] < 0.7 * variance["pathwise"]


def test_dreg_wants_every_site():
    with pytest.raises(UnsupportedSite, match="every site must"):
        SiteELBO({"z1": "dreg", "z2": "pathwise"}, objective="iwae")(HierarchyModel(), HierarchyGuide())()


@pytest.mark.parametrize("word", ["stl", "enumerate", "gumbel-softmax", "straight-through", "concrete"])
def test_estimators_that_are_not_derived_for_the_bound_are_refused(word):
    model, guide = (HierarchyModel(), HierarchyGuide()) if word == "stl" else DISCRETE["one coin"].make()
    with pytest.raises(UnsupportedSite, match="not derived for objective 'iwae'"):
        SiteELBO(word, objective="iwae", num_particles=2)(model, guide)()


def test_dreg_is_refused_under_elbo():
    with pytest.raises(UnsupportedSite, match="not derived for objective 'elbo'"):
        SiteELBO("dreg")(HierarchyModel(), HierarchyGuide())()


@pytest.mark.parametrize("vectorize", [True, False])
def test_wake_sleep_gradients_are_the_self_normalized_ones(vectorize):
    """Against Σₖ w̃ₖ ∇(log p + log q) written out by hand for the same draws."""
    model, guide = DISCRETE["chain"].make()
    both = nn.ModuleList([model, guide])
    loss = SiteELBO(objective="rws", num_particles=3, vectorize_particles=vectorize)(model, guide)
    assert loss.initialize().objective_name == "rws"

    def by_hand():
        total_p, total_q = [], []
        for z1 in [dist.Bernoulli(logits=guide.a).sample() for _ in range(3)]:
            q2 = dist.Bernoulli(logits=guide.b + guide.c * z1)
            z2 = q2.sample()
            total_q.append(dist.Bernoulli(logits=guide.a).log_prob(z1) + q2.log_prob(z2))
            total_p.append(
                dist.Bernoulli(logits=torch.tensor(0.2, dtype=F64)).log_prob(z1)
                + dist.Bernoulli(logits=model.u * z1 - 0.4).log_prob(z2)
                + dist.Normal(model.w * z2 + z1 * z2, 1.0).log_prob(X[0])
            )
        p, q = torch.stack(total_p), torch.stack(total_q)
        weights = (p - q).detach().softmax(0)
        return gradient(-(weights * (p + q)).sum(), both)

    mean = mean_over_draws(lambda: gradient(loss(), both))
    assert torch.allclose(mean, mean_over_draws(by_hand), rtol=0, atol=1e-10)


def test_wake_sleep_takes_no_word():
    with pytest.raises(BadInput, match="takes no estimator, got 'score'"):
        SiteELBO("score", objective="rws")


def test_unknown_objective():
    with pytest.raises(UnknownName, match="did you mean 'iwae'"):
        SiteELBO("score", objective="iwea")


class Constrained(PyroModule):
    """A Normal latent of which the model allows only values up to zero."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(-0.3, dtype=F64))

    def model(self):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        pyro.factor("allowed", torch.where(z <= 0, 0.0, -math.inf))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3, dtype=F64))

    def forward(self):
        pyro.sample("z", dist.Normal(self.loc, 1.0))


@pytest.mark.parametrize(
    "word, options",
    [
        ("pathwise", {"objective": "iwae"}),
        ("dreg", {"objective": "iwae"}),
        ("score", {"objective": "iwae"}),
        ("rloo", {"objective": "iwae"}),
        ("rloo", {"objective": "renyi", "alpha": 0.5}),
        ("default", {"objective": "rws"}),
    ],
)
def test_a_draw_of_weight_zero_leaves_the_bound_and_its_gradient_finite(word, options):
    """The model excludes half of the draws, of weight zero; all sixteen are excluded in one call of 65,000."""
    pyro.set_rng_seed(0)
    guide = Constrained()
    loss = SiteELBO(word, num_particles=16, **options)(guide.model, guide)
    for _ in range(8):
        value = loss()
        assert value.isfinite() and gradient(value, guide).isfinite().all()


def test_the_baseline_of_a_weight_does_not_depend_on_it():
    """Weights of zero included: subtracting one from a sum with it gives no number."""
    log_weight = torch.tensor([0.3, -math.inf, -1.2, 0.9], dtype=F64)
    found = Bound(log_weight, 0).leave_one_out()
    for k in range(4):
        others = torch.cat([log_weight[:k], log_weight[k + 1 :]])
        by_hand = torch.cat([others, others.mean()[None]]).logsumexp(0) - math.log(4)
        assert torch.allclose(found[k], by_hand, rtol=1e-14)
        for own in (2.0, -math.inf):
            changed = log_weight.index_fill(0, torch.tensor(k), own)
            assert torch.allclose(Bound(changed, 0).leave_one_out()[k], found[k], rtol=1e-14)
    alone = torch.tensor([0.3, -math.inf, -math.inf], dtype=F64)
    assert Bound(alone, 0).leave_one_out()[0] == 0

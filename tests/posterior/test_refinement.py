"""Per-datum refinement against exact posteriors, for every family, and that it leaves the pair alone."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from gumbo.errors import BadInput
from gumbo.guides import fitting, guides
from gumbo.inference import SiteELBO, diagnose, evaluate
from gumbo.inference.diagnosis.gaps import with_parts
from gumbo.inference.diagnosis.report import Verdict
from gumbo.inference.engine.progress import Stages
from gumbo.inference.posterior.refinement import RefinedGuide, refine, refinement_gap
from gumbo.inference.posterior.runner import Sweep
from gumbo.models import BernoulliVAE, CategoricalVAE, GaussianVAE, HeteroscedasticRegression, HierarchicalVAE

SHAPE = (1, 4, 4)
X = torch.tensor([[0.3, -1.2], [1.0, 0.4], [-0.7, 2.1]], dtype=torch.float64)


class Linear(pyro.nn.PyroModule):
    """z ~ N(0, 1), x ~ N(z, 1): the posterior is N(x / 2, 1 / 2)."""

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Rough(pyro.nn.PyroModule):
    """Amortized with one shift and one scale for all data."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.2 * x + self.shift, torch.ones_like(x)).to_event(1))


def test_refinement_finds_the_exact_posterior_of_each_datum(param_store):
    truth = dist.Normal(torch.zeros(2).double(), 2**0.5).log_prob(X).sum(-1)
    guide = Rough()
    assert (truth - bounds(guide) > 0.3).all()
    refined = refine(Linear(), guide, X, steps=100, lr=0.1, num_particles=8)
    torch.testing.assert_close(bounds(refined), truth, rtol=0, atol=0.1)
    fn = poutine.trace(refined).get_trace(X).nodes["z"]["fn"].base_dist
    torch.testing.assert_close(fn.loc.detach(), X / 2, rtol=0, atol=0.2)
    torch.testing.assert_close(fn.scale.detach(), torch.full_like(X, 0.5**0.5), rtol=0, atol=0.2)
    assert guide.shift.item() == 0.7 and guide.shift.grad is None


@pytest.mark.parametrize("fixed", [False, True])
def test_a_plate_of_the_datas_size_that_is_not_theirs_is_not_refined(fixed):
    """Three components beside three data, told apart by a run on fewer rows, which a guide of fixed sizes lacks."""

    def guide(x):
        with pyro.plate("components", len(X)):
            pyro.sample("centre", dist.Normal(torch.zeros(len(X)).double(), 1.0))
        with pyro.plate("data", len(X) if fixed else len(x)):
            pyro.sample("z", dist.Normal(0.2 * x, torch.ones_like(x)).to_event(1))

    if fixed:
        with pytest.raises(BadInput, match="plates components, data have as many elements as there are data"):
            RefinedGuide(guide, X)
    else:
        assert set(RefinedGuide(guide, X).offsets) == {"z/loc", "z/scale"}
    assert set(RefinedGuide(guide, X, shared=True).offsets) == {"z/loc", "z/scale", "centre/loc", "centre/scale"}


def test_nested_plates_of_the_datas_size_need_not_be_told_apart():
    def guide(x):
        with pyro.plate("data", len(X), dim=-1), pyro.plate("pixels", len(X), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(3, 3).double(), 1.0))

    assert set(RefinedGuide(guide, X).offsets) == {"z/loc", "z/scale"}


@pytest.mark.parametrize("initial", [(), (torch.tensor(9.0).double(),)], ids=["registered elsewhere", "with a value"])
def test_a_guide_that_is_a_function_keeps_its_fitted_parameters(initial, param_store):
    pyro.param("shift", torch.tensor(0.7, dtype=torch.float64))
    pyro.param("scale", torch.tensor(1.0).double(), constraint=dist.constraints.positive)

    def guide(x):
        scale = pyro.param("scale", *initial, constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            loc = 0.2 * x + pyro.param("shift", *initial)
            pyro.sample("z", dist.Normal(loc, scale.expand_as(x)).to_event(1))

    other, same = (refine(Linear(), one, X, steps=5) for one in (Rough(), guide))
    for ours, theirs in zip(same.offsets.values(), other.offsets.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert diagnose(Linear(), guide, X, num_samples=100, num_simulations=20, progress=False).verdicts
    assert pyro.param("shift").item() == 0.7 and pyro.param("shift").grad is None


class Renamed(pyro.nn.PyroModule):
    """A program with its site ``z`` under another name."""

    def __init__(self, program, name):
        super().__init__()
        self.program, self.name = program, name

    def forward(self, x):
        with _Renaming(self.name):
            return self.program(x)


class _Renaming(poutine.messenger.Messenger):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["name"] = self.name


@pytest.mark.parametrize("name", ["layer.weight", "a:b.c", "a.b:c", "a/b", "keys"])
def test_a_site_may_have_any_name(name, param_store):
    model, guide = (Renamed(one, name) for one in (Linear(), Rough()))
    expected = refine(Linear(), Rough(), X, steps=5)
    refined = refine(model, guide, X, steps=5)
    for ours, theirs in zip(refined.offsets.values(), expected.offsets.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert evaluate(model, refined, X).elbo == pytest.approx(evaluate(Linear(), expected, X).elbo)
    assert diagnose(model, guide, X, num_samples=100, num_simulations=20, refine_steps=2, progress=False).alarms


def bounds(guide):
    """The exact bound of each datum: log p(x) less the KL to the posterior."""
    fn = poutine.trace(guide).get_trace(X).nodes["z"]["fn"].base_dist
    truth = dist.Normal(torch.zeros(2).double(), 2**0.5).log_prob(X)
    return (truth - torch.distributions.kl_divergence(fn, dist.Normal(X / 2, 0.5**0.5))).sum(-1).detach()


def test_a_discrete_latent_is_refined_to_its_posterior(param_store):
    model = BernoulliVAE(SHAPE, num_latents=1, hidden=(6,)).double()
    guide = guides["bernoulli"](model).double()
    x = torch.randint(2, (4, *SHAPE)).double()
    with torch.no_grad():
        model.decoder[0].weight *= 5
        joint = []
        for z in (0.0, 1.0):
            values = torch.full((4, 1), z, dtype=torch.float64)
            trace = poutine.trace(poutine.condition(model, data={"z": values})).get_trace(x)
            trace.compute_log_prob()
            joint.append(sum(s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample" and "log_prob" in s))
    truth = torch.stack(joint).logsumexp(0)
    exact = SiteELBO("enumerate")
    refined = refine(model, guide, x, steps=150, lr=0.2, estimator="enumerate")
    assert -exact.loss(model, refined, x) == pytest.approx(truth.sum().item(), abs=5e-3)
    assert -exact.loss(model, guide, x) < truth.sum() - 0.05


@pytest.mark.parametrize("guide", fitting(HierarchicalVAE(SHAPE, **HierarchicalVAE.variants[0])))
def test_every_guide_starts_as_itself_and_gains(guide, param_store):
    torch.manual_seed(0)
    model = HierarchicalVAE(SHAPE, **HierarchicalVAE.variants[0])
    program = guides[guide](model)
    x = torch.randint(2, (6, *SHAPE)).float()
    before = {name: value.clone() for name, value in program.state_dict().items()}
    start = RefinedGuide(program, x)
    losses = []
    for each in (program, start):
        torch.manual_seed(1)
        losses.append(SiteELBO().loss(model, each, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pyro.clear_param_store()
    found = refinement_gap(model, program, x, steps=30, lr=0.1, num_samples=30)
    assert found.gap.mean() > 0.02, found.gap
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    assert all(p.grad is None for p in [*program.parameters(), *model.parameters()])
    assert len(pyro.get_param_store()) == 0


def test_relaxed_pairs_are_judged_by_their_discrete_form():
    model = CategoricalVAE(SHAPE, num_latents=2, num_classes=3, hidden=(6,), relaxed=True)
    guide = guides["relaxed-categorical"](model)
    x = torch.randint(2, (3, *SHAPE)).float()
    found = refinement_gap(model, guide, x, steps=3, estimator="rloo", num_samples=50)
    exact = model.exact()
    bound = evaluate(exact, guide.exact(exact), x, num_samples=50, batch_size=3, seed=1).elbo
    assert found.amortized.mean().item() == pytest.approx(bound, abs=1e-5)
    refined = refine(model, guide, x, steps=3)  # the relaxed guide itself can be refined too
    assert set(refined.offsets) == {"y/logits"} and all(o.any() for o in refined.offsets.values())


def test_batches_are_refined_by_themselves():
    a = refinement_gap(Linear(), Rough(), X, steps=30, lr=0.2, num_samples=50)
    b = refinement_gap(Linear(), Rough(), X, steps=30, lr=0.2, num_samples=50, batch_size=1)
    assert (a.gap > 0.1).all() and (b.gap > 0.1).all()
    torch.testing.assert_close(a.refined, b.refined, rtol=0, atol=0.5)


@pytest.mark.parametrize("guide", ["normal", "flow"])
def test_diagnose_and_refinement_gap_report_one_number(guide, param_store):
    torch.manual_seed(3)
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(6,))
    with torch.no_grad():
        model.decoder[0].weight *= 4  # so that posteriors are far from what the untrained guide says
    program = guides[guide](model)
    x = torch.randint(2, (5, *SHAPE)).float()
    found = refinement_gap(model, program, x, steps=20, num_samples=3000)
    whole = (evidence_by_quadrature(model, x) - found.amortized).mean().item()
    extra = {}
    verdict = Verdict("gap", "ok", "", 0.0, 1.0, "")
    with_parts(verdict, Sweep(model, program, (x,), {}), 20, 0, {}, extra, {}, Stages("test", False))
    # The very same refined guide is judged, by other draws.
    (in_diagnose,) = extra["amortization_gap"][1]
    assert in_diagnose == pytest.approx(found.gap.mean().item(), rel=0.2)
    # Refining gains a good part of what there is to gain, and no more: the bound cannot pass the evidence.
    assert 0.1 < in_diagnose < whole and whole == pytest.approx(1.25, abs=0.1)


def evidence_by_quadrature(model, x, width=6.0, points=241):
    """log p(x) of each datum under a model of two Normal latents."""
    side = torch.linspace(-width, width, points)
    z = torch.cartesian_prod(side, side)
    found = []
    with torch.no_grad():
        for row in x:
            trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(row.expand(len(z), *row.shape))
            trace.compute_log_prob()
            log_joint = sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)
            found.append(log_joint.logsumexp(0) + 2 * (side[1] - side[0]).log())
    return torch.stack(found)


def test_refining_leaves_the_names_of_the_guide_alone(param_store):
    guide = Rough()
    refine(Linear(), guide, X, steps=1)
    assert guide._pyro_name == "" and not guide.shift.grad and guide.shift.requires_grad


def test_what_all_data_share_is_refined_when_asked(param_store):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))

    x = X[:, 0]
    with pytest.raises(BadInput, match="no latent in a plate over the data"):
        refine(model, guide, x)
    refined = refine(model, guide, x, shared=True, num_particles=32)
    fn = poutine.trace(refined).get_trace(x).nodes["mu"]["fn"]
    assert fn.loc.item() == pytest.approx(x.sum().item() / 4, abs=0.05)
    assert fn.scale.item() == pytest.approx(0.5, abs=0.05)


def test_mistakes_are_one_line():
    refined = refine(Linear(), Rough(), X, steps=0)
    with pytest.raises(BadInput, match="refined for 3 data, and was given 2"):
        refined(X[:2])
    regression = HeteroscedasticRegression((2,), hidden=(4,))
    with pytest.raises(BadInput, match="no latent in a plate"):
        refine(regression, guides["none"](regression), {"x": torch.ones(3, 2), "y": torch.ones(3, 1)})
    with pytest.raises(BadInput, match="steps=-1"):
        refine(Linear(), Rough(), X, steps=-1)
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,), likelihood="bernoulli")
    with pytest.raises(BadInput, match="data is empty"):
        refine(model, guides["normal"](model), torch.zeros(0, *SHAPE))


class ByPlace(pyro.nn.PyroModule):
    """The exact posterior with a parameter for each datum."""

    def __init__(self, x):
        super().__init__()
        self.loc = torch.nn.Parameter(x / 2)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1) as rows:
            pyro.sample("z", dist.Normal(self.loc[rows], 0.5**0.5 * torch.ones_like(x)).to_event(1))


def test_rows_that_do_not_stand_alone_are_refined_together():
    x = torch.linspace(-2, 2, 40).double()[:, None]
    found = refinement_gap(Linear(), ByPlace(x), x, steps=0, num_samples=2, batch_size=15)
    truth = dist.Normal(torch.zeros(()).double(), 2**0.5).log_prob(x).sum(-1)
    assert found.amortized.tolist() == pytest.approx(truth.tolist(), abs=1e-9)

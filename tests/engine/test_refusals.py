"""Programs that cannot be meant, or that ask for more than a site and a distribution: one line, or the right number."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient
from programs import F64, OneCoinGuide, OneCoinModel, Params, X, gradient
from torch import nn
from torch.distributions.transforms import AffineTransform

from gumbo.errors import BadInput, CallsAutograd, UnsupportedSite
from gumbo.inference import SiteELBO, audit, diagnose, evaluate, fit, to_arviz
from gumbo.inference.auditing.exact import mean_over_draws

# The order of the programs.


@pytest.mark.parametrize("objective", ["elbo", "iwae", "rws"])
def test_a_model_in_the_place_of_the_guide_is_refused(objective):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.7))

    loss = SiteELBO(objective=objective, num_particles=2)
    said = "^the guide observes site 'x' and the model observes none: pass the model first, then the guide$"
    with pytest.raises(BadInput, match=said):
        loss.loss(guide, model, torch.randn(5))
    with pytest.raises(BadInput, match=said):
        fit(guide, model, torch.randn(5), loss=SiteELBO(objective=objective, num_particles=2), progress=False)
    assert loss.loss(model, guide, torch.randn(5)) > 0
    pyro.clear_param_store()


# The importance-weighted objectives.


@pytest.mark.parametrize("objective", ["iwae", "rws"])
@pytest.mark.parametrize("kl_weight", [0.5, 0.0, lambda step: 1.0])
def test_a_weight_of_the_kl_is_refused_where_terms_enter_importance_weights(objective, kl_weight):
    with pytest.raises(BadInput, match=f"kl_weight is not defined for objective '{objective}'"):
        SiteELBO(objective=objective, kl_weight=kl_weight)


@pytest.mark.parametrize("objective", ["iwae", "rws"])
@pytest.mark.parametrize("place", ["global", "local"])
def test_a_subsampled_sequential_plate_has_no_weight_per_datum(objective, place):
    def model(x, subsample_size):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0)) if place == "global" else 0.0
        for i in pyro.plate("data", len(x), subsample_size=subsample_size):
            z = pyro.sample(f"z{i}", dist.Normal(mean, 1.0)) if place == "local" else mean
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x, subsample_size):
        if place == "global":
            pyro.sample("mean", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x), subsample_size=subsample_size):
            if place == "local":
                pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    x = torch.randn(4)
    loss = SiteELBO(objective=objective, num_particles=3, vectorize_particles=False)
    with pytest.raises(UnsupportedSite, match="sequential plate 'data' is subsampled"):
        loss.loss(model, guide, x, 2)
    assert loss.loss(model, guide, x, 4) > 0
    assert SiteELBO(num_particles=3, vectorize_particles=False).loss(model, guide, x, 2) > 0


@pytest.mark.parametrize("how", ["obs", "condition", "deterministic"])
@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_a_latent_of_the_guide_that_the_model_conditions_on(objective, how):
    def model():
        if how == "deterministic":
            z = pyro.deterministic("z", torch.tensor(1.0))
        else:
            z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0) if how == "obs" else None)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 0.1))

    conditioned = pyro.condition(model, data={"z": torch.tensor(1.0)}) if how == "condition" else model
    with pytest.raises(UnsupportedSite, match="site 'z': the guide samples it, and the model observes it"):
        SiteELBO(objective=objective).loss(conditioned, guide)


# Programs without sites.


@pytest.mark.parametrize("objective", ["elbo", "iwae", "rws"])
def test_empty_programs_have_the_objective_zero(objective):
    def empty():
        pass

    assert SiteELBO(objective=objective).loss_and_grads(empty, empty) == 0.0
    assert SiteELBO(objective=objective)(empty, empty)().shape == ()


# Programs that take derivatives while they run.


class InnerStep(Params):
    """A guide that improves its parameter by a step of gradient descent of its own (semi-amortized inference)."""

    def __init__(self):
        super().__init__(a=0.4)

    def logit(self):
        a = self.a * 1.0
        (slope,) = torch.autograd.grad((a - 1).square(), a, create_graph=True)
        return a - 0.1 * slope

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.logit()))


@pytest.mark.parametrize("word", ["score", "rloo", "enumerate", "local-expectation", "measure-valued", "disarm"])
def test_a_guide_that_calls_autograd(word):
    model, guide = OneCoinModel(), InnerStep()
    exact = exact_gradient(model, guide)
    loss = SiteELBO(word)(model, guide)
    with torch.no_grad():
        assert not loss().requires_grad
    if word == "disarm":  # its uniforms cannot be listed
        assert loss().requires_grad
        return
    mean = mean_over_draws(lambda: gradient(loss(), nn.ModuleList([model, guide])))
    assert torch.allclose(mean, exact, rtol=0, atol=1e-10)


class OwnSlope(Params):
    """A guide that differentiates with respect to a draw of its own."""

    def __init__(self):
        super().__init__(a=0.4)

    def forward(self):
        z = pyro.sample("z", dist.Normal(self.a, 1.0))
        (slope,) = torch.autograd.grad((z - 1).square().sum(), z, create_graph=True)
        pyro.sample("y", dist.Normal(z - 0.1 * slope, 1.0))


def slope_model():
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    y = pyro.sample("y", dist.Normal(z, 1.0))
    pyro.sample("x", dist.Normal(y, 1.0), obs=X[0])


@pytest.mark.parametrize("word", ["pathwise", "stl", "score", "measure-valued"])
def test_a_guide_that_differentiates_its_draw(word):
    loss = SiteELBO(word, num_particles=2)(slope_model, OwnSlope())
    if word in ("pathwise", "stl"):
        assert loss().requires_grad
    else:
        with pytest.raises(CallsAutograd, match="something there carries no gradient"):
            loss()


# Networks of baselines, where what is known upstream changes.


class BranchingGuide(Params):
    def __init__(self):
        super().__init__(a=0.3, b=0.1)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        if z > 0:
            pyro.sample("u", dist.Bernoulli(logits=self.b))
        pyro.sample("w", dist.Bernoulli(logits=self.b))


def branching_model():
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
    u = pyro.sample("u", dist.Bernoulli(torch.tensor(0.5, dtype=F64))) if z > 0 else 0.0
    w = pyro.sample("w", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
    pyro.sample("x", dist.Normal(z + w + u, 1.0), obs=X[0])


@pytest.mark.parametrize("word", ["nvil", "relax"])
def test_a_network_is_told_when_what_it_sees_changes(word):
    loss = SiteELBO({"*": "score", "w": word}, vectorize_particles=False)(branching_model, BranchingGuide())
    loss.initialize()
    with pytest.raises(UnsupportedSite, match="site 'w': its network was made for . inputs and is given .: .*inputs="):
        for _ in range(30):
            loss()


# Threads and copies.


def test_threads_take_turns():
    model, guide = OneCoinModel(), OneCoinGuide()
    loss, svi = SiteELBO("rloo")(model, guide), SiteELBO("score-average")
    failures = []

    def work():
        try:
            for _ in range(40):
                loss().backward()
                with torch.no_grad():
                    svi.loss(model, guide)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    with pyro.get_param_store().scope():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


@pytest.mark.parametrize("again", [copy.deepcopy, lambda elbo: pickle.loads(pickle.dumps(elbo))])
def test_a_copy_of_a_used_loss_goes_on_with_what_it_learnt(again, param_store):
    def model():  # a local function cannot be pickled, and need not be
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    guide = OneCoinGuide()
    elbo = SiteELBO("nvil")
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    copied = again(elbo)
    with pyro.get_param_store().scope():
        copied.loss(model, guide)
    learnt, kept = elbo._bindings[0].state_dict(), copied._bindings[0].state_dict()
    assert learnt.keys() == kept.keys() and learnt["states.z.seen"] == 3
    for name, value in learnt.items():
        assert value == kept[name] if name.endswith("_extra_state") else torch.equal(value, kept[name])


# The rows of a plate.


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.arange(12).reshape(3, 4), r"has shape \(3, 4\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "holds torch.float32"),
        (torch.tensor([True, False, True]), "holds torch.bool"),
        (["a", "b", "c"], "is list"),
    ],
)
@pytest.mark.parametrize("where", ["model", "guide"])
def test_rows_of_a_plate_are_a_list_of_numbers_for_everyone(rows, said, where):
    def data(here):
        return pyro.plate("data", 12, subsample=rows if where == here else torch.arange(3))

    def model(x):
        with data("model"):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros((), dtype=F64))
        with data("guide"):
            pyro.sample("z", dist.Normal(loc, 1.0))

    x = torch.arange(3, dtype=F64)
    refused = pytest.raises(BadInput, match=rf"^plate 'data': subsample= {said}, expected row numbers \(B,\)")
    takes = [partial(take, model, guide, x) for take in (evaluate, to_arviz, diagnose, SiteELBO("rloo").loss)]
    takes += [partial(audit, model, guide, x, num_samples=10), partial(fit, model, guide, x, progress=False)]
    for take in takes:
        with pyro.get_param_store().scope(), refused:
            take()


def test_a_batch_in_the_place_of_its_row_numbers_is_told_how_to_be_passed():
    """With the remedy, the loss is Trace_ELBO's, scaled by N/B."""

    def program(x, obs, sizes):
        with pyro.plate("data", 12, **sizes):
            z = pyro.sample("z", dist.Normal(x.mean(-1) if obs is None else torch.zeros((), dtype=F64), 1.0))
            if obs is not None:
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((3, 2)).to_event(1), obs=obs)

    x = torch.arange(6, dtype=F64).reshape(3, 2)
    with pytest.raises(BadInput, match=r"row numbers are not known, pass subsample_size=len\(x\)$"):
        SiteELBO().loss(lambda x: program(x, x, {"subsample": x}), lambda x: program(x, None, {"subsample": x}), x)
    found, sizes = [], {"subsample_size": len(x)}
    for objective in (SiteELBO(), pyro.infer.Trace_ELBO()):
        pyro.set_rng_seed(0)
        found.append(objective.loss(lambda x: program(x, x, sizes), lambda x: program(x, None, sizes), x))
    assert found[0] == pytest.approx(found[1], abs=1e-12)


@pytest.mark.parametrize("sizes", [{"size": 0}, {"size": 3, "subsample": torch.arange(0)}])
def test_a_plate_without_rows_is_empty_data(sizes):
    def program(obs):
        with pyro.plate("data", **sizes):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            if obs is not None:
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    with pytest.raises(BadInput, match="^plate 'data' is empty: expected at least one row of data$"):
        SiteELBO("pathwise")(program, lambda x: program(None))(torch.zeros(0, dtype=F64))


def test_a_division_by_zero_of_the_users_own_passes_unchanged():
    with pytest.raises(ZeroDivisionError, match="^division by zero$"):
        SiteELBO("pathwise")(lambda: None, lambda: 1 / 0)()


def test_rows_of_a_plate_may_be_a_plain_list():
    def program(rows, obs):
        with pyro.plate("data", 12, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0))
            if obs is not None:
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    x, values = torch.arange(3, dtype=F64), []
    for rows in ([4, 0, 2], torch.tensor([4, 0, 2])):

        def model(x, rows=rows):
            program(rows, x)

        def guide(x, rows=rows):
            program(rows, None)

        torch.manual_seed(0)
        values.append((SiteELBO().loss(model, guide, x), evaluate(model, guide, x, num_samples=3, seed=0).elbo))
    assert values[0] == values[1]


# Events whose size follows a draw.


@pytest.mark.parametrize("word", ["score", "rloo", "nvil", "double-cv", "muprop"])
def test_particles_with_events_of_other_sizes_are_one_line(word):
    torch.manual_seed(0)
    logits, coin = torch.tensor([0.2, -0.5], requires_grad=True), torch.tensor(0.3, requires_grad=True)

    def model():
        u = pyro.sample("u", dist.Bernoulli(0.4))
        z = pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(1 + int(u.item()))).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + u, 1.0), obs=torch.tensor(0.3))

    def guide():
        u = pyro.sample("u", dist.Bernoulli(logits=coin))
        pyro.sample("z", dist.Bernoulli(logits=logits[: 1 + int(u.item())]).to_event(1))

    loss = SiteELBO(word, num_particles=3, vectorize_particles=False)
    with (
        pyro.get_param_store().scope(),
        pytest.raises(BadInput, match="site 'z' has another shape in every particle .*num_particles=1"),
    ):
        for _ in range(30):
            loss.differentiable_loss(model, guide)


@pytest.mark.parametrize("word", ["default", "pathwise"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_family_that_a_later_call_takes_is_checked_under_any_wrapper(word, masked):
    """A Bernoulli has no path: taken for the Normal of the first call, its gradient would be lost without an error."""
    zeros = torch.zeros(2, dtype=F64)

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.tensor([0.3, -0.5], dtype=F64))

        def forward(self, coins):
            program(coins, self.at)

    def program(coins, at=zeros):
        fn = dist.Bernoulli(logits=at) if coins else dist.Normal(at, 1.0)
        pyro.sample("z", fn.to_event(1).mask(True) if masked else fn.to_event(1))

    loss = SiteELBO(word)(program, Guide())
    loss(False)
    with pytest.raises(UnsupportedSite, match="'z'.*(discrete|Bernoulli)"):
        loss(True)


@pytest.mark.parametrize(
    ("law", "word"),
    [
        (lambda at: dist.Uniform(0.0, at.exp()), "rloo"),
        (lambda at: dist.Gamma(2.0 + at, 1.0), "measure-valued"),
        (lambda at: dist.TransformedDistribution(dist.Uniform(0.0, 1.0), [AffineTransform(0.0, at.exp())]), "score"),
    ],
)
def test_a_parameter_that_a_later_call_learns_is_checked(law, word):
    """Frozen in the first call, it moves no support; its gradient would then be 0 without an error."""

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.zeros((), dtype=F64), requires_grad=False)

        def forward(self):
            pyro.sample("z", law(self.at))

    guide = Guide()
    loss = SiteELBO(word, num_particles=2)(lambda: pyro.sample("z", dist.Exponential(torch.ones((), dtype=F64))), guide)
    loss()
    guide.at.requires_grad_(True)
    with pytest.raises(UnsupportedSite, match="'z'.*(support|learns)"):
        loss()

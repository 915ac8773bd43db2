"""Models that enumerate discrete sites which the guide leaves out, held against sums over every value."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from scipy import stats as scipy_stats

from gumbo.errors import BadInput
from gumbo.inference import SiteELBO, diagnose, evaluate, to_arviz
from gumbo.inference.posterior import _arviz
from gumbo.inference.posterior.runner import Sweep

X = torch.tensor([-2.3, -1.6, 1.2, 2.5, 2.1, 0.1]).double()
PARALLEL = {"enumerate": "parallel"}
WEIGHTS = torch.tensor([0.4, 0.6]).double()


def group(idata, name):
    return _arviz.dataset_of(idata, name)


@config_enumerate
def mixture(data):
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("data", len(data)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=data)


def over_locs(data):
    with pyro.plate("components", 2):
        pyro.sample("locs", dist.Normal(torch.tensor([-1.8, 1.4]).double(), torch.tensor([1.2, 0.9]).double()))


def conditionals(locs):
    """log p(x, k | locs), ``(..., N, 2)``."""
    return WEIGHTS.log() + dist.Normal(locs[..., None, :], 1.0).log_prob(X[:, None])


def test_the_usual_mixture_has_each_datum_summed_over_its_component():
    idata = to_arviz(mixture, over_locs, X, num_samples=400)
    posterior = group(idata, "posterior")
    assert posterior["k"].dims == ("chain", "draw", "data") and posterior["k"].dtype.kind == "i"
    locs = torch.from_numpy(posterior["locs"].values[0])
    joint = conditionals(locs)
    exact = torch.logsumexp(joint, -1)
    np.testing.assert_allclose(group(idata, "log_likelihood")["x"][0], exact, atol=1e-9)
    # Components are drawn with their exact probabilities, given each draw's own locations.
    ones = torch.softmax(joint, -1)[..., 1]
    z = (torch.from_numpy(posterior["k"].values[0]).double() - ones).sum(0) / (ones * (1 - ones)).sum(0).sqrt()
    assert z.abs().max() < 4
    stats = group(idata, "sample_stats")
    np.testing.assert_allclose(stats["log_weight"][0], exact, atol=1e-9)


def test_the_evidence_of_the_usual_mixture():
    grid = torch.linspace(-14, 14, 281).double()
    locs = torch.cartesian_prod(grid, grid)
    joint = torch.logsumexp(conditionals(locs), -1).sum(-1) + dist.Normal(0.0, 3.0).log_prob(locs).sum(-1)
    truth = (torch.logsumexp(joint, 0) + 2 * torch.log(grid[1] - grid[0])).item()

    def wide(data):  # the posterior has two modes: components may change places
        with pyro.plate("components", 2):
            pyro.sample("locs", dist.Normal(torch.zeros(()).double(), 2.4))

    found = evaluate(mixture, wide, X, num_samples=4000)
    assert abs(6 * found.log_evidence - truth) < 4 * 6 * found.log_evidence_mc_se < 0.6
    assert not found.reason


def test_diagnose_takes_the_usual_mixture():
    report = diagnose(mixture, over_locs, X, num_samples=400, num_simulations=20, refine_steps=2, progress=False)
    np.testing.assert_allclose(report.vi_stats["khat"], 0.0)  # of the components, which are drawn exactly
    assert "khat_global" in report.vi_stats


def chained(family):
    """a -> b -> x in each row, b in a family of its own, and a global coin that all rows share."""

    def model(data):
        switch = pyro.sample("switch", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("data", len(data)):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.5, 0.3]).double()))
            p = torch.tensor([0.1, 0.6, 0.8]).double()[a.long()]
            if family is dist.Bernoulli:
                b = pyro.sample("b", dist.Bernoulli(p))
            else:
                one_hot = pyro.sample("b", dist.OneHotCategorical(torch.stack([1 - p, p], -1)))
                b = one_hot[..., 1]
            pyro.sample("x", dist.Normal(b * 2 + a - switch, 1.0), obs=data)

    return config_enumerate(model)


def nothing(*args, **kwargs):
    pass


@pytest.mark.parametrize("family", [dist.Bernoulli, dist.OneHotCategorical])
def test_sites_that_depend_on_each_other_are_drawn_jointly(family):
    x = X[:3]
    p = torch.tensor([0.1, 0.6, 0.8]).double()
    terms = {}
    for switch, a, b in itertools.product(range(2), range(3), range(2)):
        prior = torch.tensor([0.2, 0.5, 0.3])[a].double().log() + (p[a] if b else 1 - p[a]).log()
        terms[switch, a, b] = prior + dist.Normal(2.0 * b + a - switch, 1.0).log_prob(x)
    by_switch = [torch.stack([terms[s, a, b] for a in range(3) for b in range(2)]).logsumexp(0).sum() for s in range(2)]
    joint = torch.stack(by_switch) + torch.tensor([0.7, 0.3]).double().log()
    truth = torch.logsumexp(joint, 0).item()
    found = evaluate(chained(family), nothing, x, num_samples=30)
    # Everything is summed out: every draw has the one weight, which is the evidence.
    assert 3 * found.log_evidence == pytest.approx(truth, abs=1e-6)
    assert 3 * found.elbo == pytest.approx(truth, abs=1e-6)
    idata = to_arviz(chained(family), nothing, x, num_samples=3000, groups=["posterior"])
    drawn = float(group(idata, "posterior")["switch"].mean())
    expected = torch.softmax(joint, 0)[1].item()
    assert abs(drawn - expected) < 4 * (expected * (1 - expected) / 3000) ** 0.5


def test_a_markov_chain_is_drawn_backwards():
    step = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()

    @config_enumerate
    def model(data):
        k = 0
        for t in pyro.markov(range(len(data))):
            k = pyro.sample(f"k{t}", dist.Categorical(step[k]))
            pyro.sample(f"x{t}", dist.Normal(2.0 * k, 1.0), obs=data[t])

    paths = torch.stack(
        [
            sum(
                step[(0, *path)[t], path[t]].log() + dist.Normal(2.0 * path[t], 1.0).log_prob(X[t])
                for t in range(len(X))
            )
            for path in itertools.product(range(2), repeat=len(X))
        ]
    )
    found = evaluate(model, nothing, X, num_samples=5)
    assert len(X) * found.log_evidence == pytest.approx(paths.logsumexp(0).item(), abs=1e-6)


@config_enumerate
def rows_of_more(data, size=4):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(data), subsample_size=size) as rows:
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(mu + k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=data[rows])


def test_a_subsampled_plate_that_only_the_model_has_and_a_continuous_local_latent():
    def guide(data):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.2).double(), 0.6))
        with pyro.plate("data", len(data), subsample_size=4) as rows:
            pyro.sample("z", dist.Normal(0.8 * data[rows] + 0.1 * mu, 0.5))

    def alone(data):
        pyro.sample("mu", dist.Normal(torch.tensor(0.2).double(), 0.6))

    idata = to_arviz(rows_of_more, guide, X, num_samples=30, num_local_samples=2000)
    mu = torch.from_numpy(group(idata, "posterior")["mu"].values[0])
    sd = torch.tensor(1.25).double().sqrt()
    exact = torch.logsumexp(
        WEIGHTS.log() + dist.Normal(mu[:, None, None] + torch.arange(2.0).double(), sd).log_prob(X[:, None]), -1
    )
    assert np.abs(group(idata, "log_likelihood")["x"][0] - exact.numpy()).max() < 0.15
    hidden = pyro.poutine.condition(rows_of_more, {"z": X[:4]})
    assert "k" in Sweep(hidden, alone, (X[:4],), {}).summed_out


def test_only_what_is_marked_and_left_out_is_summed():
    def plain(data):
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5).double()))
            pyro.sample("x", dist.Normal(k, 1.0), obs=data)

    def guide(data):
        with pyro.plate("data", len(data)):
            pyro.sample("k", dist.Bernoulli(torch.tensor(0.5).double()))

    assert not Sweep(config_enumerate(plain), guide, (X,), {}).summed_out
    with pytest.raises(BadInput, match="'k' is latent in the model but the guide does not draw it.*'parallel'"):
        evaluate(plain, nothing, X)

    @config_enumerate
    def counts(data):
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Binomial(3, torch.tensor(0.5).double()))
            pyro.sample("x", dist.Normal(k, 1.0), obs=data)

    with pytest.raises(BadInput, match="'k' is enumerated in the model, and Binomial is none of"):
        evaluate(counts, nothing, X)


def chains(y, lengths, shared=True):
    """Sequences of several lengths, a switch that all share, and two linked chains in each."""
    steps = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double()
    switch = pyro.sample("switch", dist.Bernoulli(torch.tensor(0.4).double()), infer=PARALLEL) if shared else 0.0
    with pyro.plate("sequences", len(y)):
        w = x = torch.tensor(0)
        for i in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=i < lengths):
                w = pyro.sample(f"w{i}", dist.Categorical(steps[w]), infer=PARALLEL)
                x = pyro.sample(f"x{i}", dist.Categorical(Vindex(steps)[(w + x) % 2]), infer=PARALLEL)
                pyro.sample(f"y{i}", dist.Normal(w + 2.0 * x + switch, 1.0), obs=y[:, i])


def test_every_draw_of_linked_chains_has_the_evidence_for_its_weight():
    generator = torch.Generator().manual_seed(0)
    y, lengths = 2 * torch.randn(3, 12, generator=generator).double(), torch.tensor([12, 7, 1])
    truth = -SiteELBO()(chains, nothing)(y, lengths, shared=False).item()
    idata = to_arviz(chains, nothing, y, lengths, shared=False, num_samples=50, groups=["posterior", "sample_stats"])
    assert group(idata, "posterior")["x11"].dims == ("chain", "draw", "sequences")
    log_weight = group(idata, "sample_stats")["log_weight"].values
    np.testing.assert_allclose(log_weight.reshape(50, -1).sum(-1), truth, atol=1e-8)


def test_states_are_drawn_as_often_as_the_smoother_says():
    generator = torch.Generator().manual_seed(1)
    y, lengths = 2 * torch.randn(1, 3, generator=generator).double(), torch.tensor([3])
    posterior = group(to_arviz(chains, nothing, y, lengths, num_samples=4000, groups=["posterior"]), "posterior")
    drawn = np.stack(
        [posterior["switch"].values[0], *(posterior[f"{c}{i}"].values[0, :, 0] for i in range(3) for c in "wx")]
    )
    codes = (drawn * 2 ** np.arange(7)[:, None]).sum(0)
    exact = np.zeros(128)
    for bits in itertools.product(range(2), repeat=7):
        values = {"switch": torch.tensor(float(bits[0])).double()}
        values |= {f"{c}{i}": torch.tensor([bits[1 + 2 * i + k]]) for i in range(3) for k, c in enumerate("wx")}
        trace = poutine.trace(poutine.condition(chains, values)).get_trace(y, lengths)
        exact[sum(bit << place for place, bit in enumerate(bits))] = trace.log_prob_sum().exp().item()
    exact /= exact.sum()
    often = exact * 4000 > 5
    found = np.bincount(codes, minlength=128)
    chi2 = (((found - exact * 4000) ** 2)[often] / (exact * 4000)[often]).sum()
    assert chi2 < scipy_stats.chi2.ppf(1 - 1e-6, often.sum() - 1)
    assert found[~often].sum() < 4000 * exact[~often].sum() + 6 * (4000 * exact[~often].sum()) ** 0.5


def test_plates_that_cross_are_refused_in_one_line():
    def model(y):
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3).double()), infer=PARALLEL)
        with columns:
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.6).double()), infer=PARALLEL)
        with rows, columns:
            pyro.sample("y", dist.Normal(a + 2 * b, 1.0), obs=y)

    with pytest.raises(BadInput, match="plates that cross.*draw one in the guide") as caught:
        to_arviz(model, nothing, torch.zeros(3, 2).double(), num_samples=5)
    assert "\n" not in str(caught.value)


def test_a_loop_of_more_sites_than_torch_has_dimensions_is_refused_in_one_line():
    def model():
        for i in pyro.plate("rows", 80):
            z = pyro.sample(f"z{i}", dist.Bernoulli(0.3), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    with pytest.raises(BadInput, match="enumerated in the model.*vectorized plate") as caught:
        to_arviz(model, nothing, num_samples=5)
    assert "\n" not in str(caught.value)


def test_sites_of_a_loop_over_other_elements_in_each_run_are_refused_in_one_line(param_store):
    def model():
        for i in pyro.plate("rows", 60, subsample_size=2):
            z = pyro.sample(f"z{i}", dist.Bernoulli(0.3), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    with pytest.raises(BadInput, match="enumerated in the model in some runs only") as caught:
        to_arviz(model, nothing, num_samples=5)
    assert "\n" not in str(caught.value)


def test_the_evidence_of_long_chains():
    generator = torch.Generator().manual_seed(2)
    y, lengths = 2 * torch.randn(2, 40, generator=generator).double(), torch.tensor([40, 31])
    truth = -SiteELBO()(chains, nothing)(y, lengths).item()
    found = evaluate(chains, nothing, (y, lengths), num_samples=4)
    assert 2 * found.log_evidence == pytest.approx(truth, abs=1e-7) == 2 * found.elbo

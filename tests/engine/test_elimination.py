"""Sites that the model lists and the guide leaves out, against the forward algorithm, listing and Pyro's own ELBO."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import sys
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient, mean_gradient
from programs import F64, Params, gradient
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import nn
from ztest import misses

from gumbo.errors import GumboError, UnsupportedSite
from gumbo.inference import SiteELBO, audit
from gumbo.inference.auditing.exact import exact_elbo, exact_iwae
from gumbo.inference.engine import contraction, elimination
from gumbo.inference.engine.elimination import TooMuchMemory
from gumbo.inference.engine.rows import Rows
from gumbo.inference.estimators import Enumerate
from gumbo.inference.training.splittable import refuse, study

PARALLEL = {"enumerate": "parallel"}


def nothing(*args, **kwargs):
    """A guide without a site."""


def t(*values):
    return torch.tensor(values if len(values) != 1 else values[0], dtype=F64)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Chain(Params):
    """A hidden Markov model of K states with Normal observations."""

    def __init__(self, states=3, dtype=F64):
        super().__init__()
        self.steps = nn.Parameter(randn(states, states).to(dtype))
        self.means = nn.Parameter(3 * randn(states, seed=1).to(dtype))

    def forward(self, y, shift=0.0):
        z = 0
        for i in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{i}", dist.Categorical(logits=self.steps[z]), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Normal(self.means[z] + shift, 1.0), obs=y[i])


def forward(steps, seen):
    """The forward algorithm: log of the sum over all paths; ``seen`` is (T, …, K)."""
    steps = steps.log_softmax(-1)
    alpha = steps[0] + seen[0]
    for now in seen[1:]:
        alpha = torch.logsumexp(alpha.unsqueeze(-1) + steps, -2) + now
    return torch.logsumexp(alpha, -1)


def evidence(chain, y, shift=0.0):
    return forward(chain.steps, dist.Normal(chain.means + shift, 1.0).log_prob(y[:, None]))


def close(found, expected, relative=1e-8):
    return ((found - expected).norm() <= relative * expected.norm()).item()


@pytest.mark.parametrize("length", [5, 50, pytest.param(500, marks=pytest.mark.slow)])
def test_a_chain_has_the_evidence_and_gradient_of_the_forward_algorithm(length):
    chain, y = Chain(16), 3 * randn(length)
    loss = SiteELBO()(chain, nothing)
    value, exact = loss(y), -evidence(chain, y)
    assert value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert close(gradient(value, chain), gradient(exact, chain), 1e-10)
    assert loss.objective_name == "elbo"


def test_sums_of_tiny_products_are_kept_where_pyros_own_contraction_rounds_them(param_store):
    chain, y = Chain(2, torch.float32), t(0.0, 30.0, 0.0, 30.0).float()
    chain.steps.data, chain.means.data = torch.tensor([[0.0, -200.0], [-200.0, 0.0]]), torch.tensor([0.0, 30.0])
    exact = -evidence(copy.deepcopy(chain).double(), y.double()).item()
    assert SiteELBO()(chain, nothing)(y).item() == pytest.approx(exact, rel=1e-6)
    stock = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(chain, nothing, y).item()
    assert abs(stock - exact) > 100


def test_impossible_values_count_for_nothing_and_leave_gradients_finite():
    logits = nn.Parameter(t(0.3, -0.2, 0.1))

    def model(low):
        for i in pyro.markov(range(3)):
            z = pyro.sample(f"z{i}", dist.Categorical(logits=logits), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Uniform(z * 1.0, z + 1.0, validate_args=False), obs=t(low))

    value = SiteELBO()(model, nothing)(1.5)
    q = logits.log_softmax(-1)[1]
    assert value.item() == pytest.approx(-3 * q.item())
    (found,), (exact,) = torch.autograd.grad(value, logits), torch.autograd.grad(-3 * q, logits)
    assert close(found, exact)
    nowhere = SiteELBO()(model, nothing)(9.0)
    assert nowhere.item() == math.inf
    assert torch.autograd.grad(nowhere, logits)[0].isfinite().all()


# Programs of many shapes, against Pyro's own ELBO and against every joint value.


class Programs(Params):
    """Parameters of the programs below; each is a method that takes no data."""

    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(randn(2, 2, seed=2))
        self.more = nn.Parameter(randn(2, 2, 2, seed=3))
        self.means = nn.Parameter(2 * randn(2, 2, seed=4))

    def _state(self, name, logits):
        return pyro.sample(name, dist.Categorical(logits=logits), infer=PARALLEL)

    def chain_in_a_plate_with_lengths(self):
        """Sequences of several lengths and a plate of observations within each, masked beyond their ends."""
        y, lengths = randn(2, 3, 2, seed=5), torch.tensor([3, 2])
        inner = pyro.plate("tones", 2, dim=-1)
        with pyro.plate("sequences", 2, dim=-2):
            x = 0
            for i in pyro.markov(range(3)):
                with poutine.mask(mask=(i < lengths).unsqueeze(-1)):
                    x = self._state(f"x{i}", self.steps[x])
                    with inner as tones:
                        pyro.sample(f"y{i}", dist.Normal(self.means[x, tones], 1.0), obs=y[:, i])

    def sequences_one_by_one(self):
        """A sequential plate of chains, each with its own length."""
        y = randn(2, 4, 2, seed=5)
        inner = pyro.plate("tones", 2, dim=-1)
        for s in pyro.plate("sequences", 2):
            x = 0
            for i in pyro.markov(range(4 - s)):
                x = self._state(f"x{s}_{i}", self.steps[x])
                with inner as tones:
                    pyro.sample(f"y{s}_{i}", dist.Normal(Vindex(self.means)[x, tones], 1.0), obs=y[s, i])

    def autoregressive(self):
        """Observations that depend on the state and on the observation before."""
        seen = t([0.0, 1.0, 1.0], [1.0, 0.0, 1.0])
        with pyro.plate("sequences", 2, dim=-1):
            x, y = 0, torch.zeros(2).long()
            for i in pyro.markov(range(3)):
                x = self._state(f"x{i}", self.steps[x])
                y = pyro.sample(f"y{i}", dist.Bernoulli(logits=Vindex(self.means)[x, y]), obs=seen[:, i]).long()

    def factorial(self):
        """Two chains behind each observation, in sequences of several lengths."""
        y, lengths = randn(2, 2, seed=6), torch.tensor([2, 1])
        with pyro.plate("sequences", 2, dim=-1):
            w, x = 0, 0
            for i in pyro.markov(range(2)):
                with poutine.mask(mask=i < lengths):
                    w = self._state(f"w{i}", self.steps[w])
                    x = self._state(f"x{i}", self.more[0][x])
                    pyro.sample(f"y{i}", dist.Normal(Vindex(self.means)[w, x], 1.0), obs=y[:, i])

    def factorial_with_ties(self):
        """The second chain depends on the first as well."""
        y = randn(2, 2, seed=6)
        with pyro.plate("sequences", 2, dim=-1):
            w = x = torch.tensor(0)
            for i in pyro.markov(range(2)):
                w = self._state(f"w{i}", self.steps[w])
                x = self._state(f"x{i}", Vindex(self.more)[w, x])
                pyro.sample(f"y{i}", dist.Normal(Vindex(self.means)[w, x], 1.0), obs=y[:, i])

    def two_back(self):
        """A chain whose states depend on two before them."""
        y = randn(5, seed=7)
        x = before = torch.tensor(0)
        for i in pyro.markov(range(5), history=2):
            x, before = self._state(f"x{i}", Vindex(self.more)[before, x]), x
            pyro.sample(f"y{i}", dist.Normal(self.means[0][x], 1.0), obs=y[i])

    def tree(self):
        """Branches that share their root, with depth three."""
        y = randn(14, seed=8)
        count = itertools.count()

        @pyro.markov
        def grow(parent, name, depth):
            x = self._state(f"x{name}", self.steps[parent])
            pyro.sample(f"y{name}", dist.Normal(self.means[0][x], 1.0), obs=y[next(count)])
            for side in "ab" if depth else "":
                grow(x, name + side, depth - 1)

        grow(0, "", 2)

    def mixture(self):
        """Assignments in a plate, their weights outside, and a coin that all rows share."""
        y = randn(4, seed=9)
        coin = pyro.sample("coin", dist.Bernoulli(logits=self.steps[0, 0]), infer=PARALLEL)
        with pyro.plate("data", 4):
            k = self._state("k", self.steps[1])
            pyro.sample("y", dist.Normal(self.means[0][k] + coin, 1.0), obs=y)

    def nested(self):
        """Groups with a state each, their members with states of their own."""
        y = randn(3, 2, seed=10)
        with pyro.plate("groups", 2, dim=-1):
            group = self._state("group", self.steps[0])
            with pyro.plate("members", 3, dim=-2):
                member = self._state("member", self.steps[group])
                pyro.sample("y", dist.Normal(Vindex(self.means)[group, member], 1.0), obs=y)

    def several_families(self):
        """One-hot and Bernoulli sites, and a site of one value."""
        one = pyro.sample("one", dist.Categorical(logits=self.steps[0, :1]), infer=PARALLEL)
        hot = pyro.sample("hot", dist.OneHotCategorical(logits=self.steps[one]), infer=PARALLEL)
        coin = pyro.sample("coin", dist.Bernoulli(logits=(hot * self.means[0]).sum(-1)), infer=PARALLEL)
        pyro.sample("y", dist.Normal(coin * self.means[1, 0] + (hot * self.means[1]).sum(-1), 1.0), obs=t(0.4))

    def loops_within_a_loop(self):
        """A state of every group, read in a loop over its members that the groups share, beside one of all."""
        y, inner = randn(2, 2, seed=27), pyro.plate("members", 2)
        root = self._state("root", self.steps[0])
        for i in pyro.plate("groups", 2):
            group = self._state(f"group{i}", self.steps[root])
            for j in inner:
                member = self._state(f"member{i}_{j}", Vindex(self.more)[root, group])
                pyro.sample(f"y{i}_{j}", dist.Normal(Vindex(self.means)[group, member], 1.0), obs=y[i, j])

    def loops_that_cross(self):
        """A state of every row and one of every column, met in a second loop over both."""
        y, rows, columns = randn(2, 3, seed=28), pyro.plate("rows", 2), pyro.plate("columns", 3)
        root = self._state("root", self.steps[0])
        row = [self._state(f"row{i}", self.steps[root]) for i in rows]
        column = [self._state(f"column{j}", self.more[0][root]) for j in columns]
        for i in rows:
            for j in columns:
                pyro.sample(f"y{i}_{j}", dist.Normal(Vindex(self.means)[row[i], column[j]], 1.0), obs=y[i, j])

    def a_loop_that_crosses_a_plate(self):
        """The same with all columns at once."""
        y, rows, columns = randn(2, 3, seed=28), pyro.plate("rows", 2), pyro.plate("columns", 3)
        root = self._state("root", self.steps[0])
        row = [self._state(f"row{i}", self.steps[root]) for i in rows]
        with columns:
            column = self._state("column", self.more[0][root])
        for i in rows:
            with columns:
                pyro.sample(f"y{i}", dist.Normal(Vindex(self.means)[row[i], column], 1.0), obs=y[i])

    def loops_that_cross_and_never_meet(self):
        """Two observations of each pair, one that reads the row's state and one the column's."""
        y, rows, columns = randn(2, 2, seed=29), pyro.plate("rows", 2), pyro.plate("columns", 2)
        root = self._state("root", self.steps[0])
        row = [self._state(f"row{i}", self.steps[root]) for i in rows]
        column = [self._state(f"column{j}", self.more[0][root]) for j in columns]
        for i in rows:
            for j in columns:
                pyro.sample(f"y{i}_{j}", dist.Normal(self.means[0][row[i]], 1.0), obs=y[i, j])
                pyro.sample(f"w{i}_{j}", dist.Normal(self.means[1][column[j]], 1.0), obs=y[j, i])

    def a_loop_that_reads_other_elements(self):
        """A second loop in another order, and a term after both loops: elements have dimensions of their own."""
        y, rows = randn(3, seed=30), pyro.plate("rows", 3)
        row = [self._state(f"row{i}", self.steps[0]) for i in rows]
        for i in rows:
            pyro.sample(f"y{i}", dist.Normal(self.means[0][row[2 - i]], 1.0), obs=y[i])
        pyro.sample("all", dist.Normal(self.means[1][row[0]] + self.means[0][row[2]], 1.0), obs=t(0.3))


PROGRAMS = [name for name, found in vars(Programs).items() if callable(found) and not name.startswith("_")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_have_the_sum_over_every_joint_value_and_the_number_of_trace_enum_elbo(name, param_store):
    programs = Programs()
    model = getattr(programs, name)
    value = SiteELBO()(model_of(programs, name), nothing)()
    exact = -exact_elbo(model, nothing)
    assert value.item() == pytest.approx(exact.item(), rel=1e-12)
    slope = gradient(value, programs)
    assert torch.allclose(slope, gradient(exact, programs), rtol=0, atol=1e-10)
    stock = TraceEnum_ELBO(max_plate_nesting=2).differentiable_loss(model, nothing)
    assert value.item() == pytest.approx(stock.item(), rel=1e-9)
    assert close(slope, gradient(stock, programs))


class model_of(pyro.nn.PyroModule):
    """One method of a module of programs, as a program."""

    def __init__(self, programs, name):
        super().__init__()
        self.programs, self.of = programs, name

    def forward(self, *args):
        return getattr(self.programs, self.of)(*args)


def test_config_enumerate_marks_what_the_guide_leaves_out():
    def model():
        a = pyro.sample("a", dist.Bernoulli(t(0.3)))
        b = pyro.sample("b", dist.Categorical(t(0.2, 0.5, 0.3)))
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=t(1.2))

    def guide():
        pyro.sample("a", dist.Bernoulli(t(0.6)))

    marked = config_enumerate(model)
    assert SiteELBO("enumerate")(marked, guide)().item() == pytest.approx(-exact_elbo(marked, guide).item(), rel=1e-12)


# Beside other sites: the sum stands where a factor with the forward algorithm's number would stand.


class Shifted(pyro.nn.PyroModule):
    """A chain whose observations are shifted by a Normal site and a coin, which the guide draws."""

    def __init__(self, as_factor):
        super().__init__()
        self.chain, self.as_factor = Chain(2), as_factor
        self.weight = nn.Parameter(t(0.7))

    def forward(self, y):
        with pyro.plate("sequences", y.shape[-1], dim=-1):
            shift = pyro.sample("shift", dist.Normal(t(0.0), 1.0))
            coin = pyro.sample("coin", dist.Bernoulli(logits=self.weight * shift))
            move = shift + self.weight * coin
            if self.as_factor:
                seen = dist.Normal(self.chain.means + move.unsqueeze(-1), 1.0)
                pyro.factor("evidence", forward(self.chain.steps, [seen.log_prob(row.unsqueeze(-1)) for row in y]))
                return
            z = 0
            for i in pyro.markov(range(len(y))):
                z = pyro.sample(f"z{i}", dist.Categorical(logits=self.chain.steps[z]), infer=PARALLEL)
                pyro.sample(f"y{i}", dist.Normal(self.chain.means[z] + move, 1.0), obs=y[i])


class ShiftedGuide(Params):
    def __init__(self):
        super().__init__(loc=[0.2, -0.4, 0.1], log_scale=-0.5, logit=0.3)

    def forward(self, y):
        with pyro.plate("sequences", y.shape[-1], dim=-1):
            shift = pyro.sample("shift", dist.Normal(self.loc, self.log_scale.exp()))
            pyro.sample("coin", dist.Bernoulli(logits=self.logit + shift))


WORDS = [
    ({"coin": "score"}, {}),
    ({"coin": "rloo"}, {"num_particles": 3}),
    ({"coin": "rloo"}, {"num_particles": 2, "vectorize_particles": False}),
    ({"coin": "gumbel-softmax"}, {"num_particles": 2}),
    ({"coin": "enumerate"}, {"num_particles": 2}),
    ({"coin": "enumerate"}, {"vectorize_particles": False}),
    ({"coin": "arm"}, {}),
    ({"coin": "local-expectation"}, {}),
    ({"coin": "score", "shift": "stl"}, {"num_particles": 2, "plates": "ignore"}),
    ({"coin": "nvil"}, {"num_particles": 2}),
    ({"coin": "score"}, {"objective": "iwae", "num_particles": 3}),
    ({}, {"objective": "rws", "num_particles": 3}),
]


@pytest.mark.parametrize(("words", "options"), WORDS, ids=lambda case: "-".join(map(str, case.values())))
def test_every_estimator_gives_the_number_that_a_factor_of_the_evidence_gives(words, options):
    y, found = randn(4, 3, seed=11), []
    for as_factor in (False, True):
        pyro.set_rng_seed(5)
        model, guide = Shifted(as_factor), ShiftedGuide()
        loss = SiteELBO(words or "default", **options)(model, guide).initialize(y)
        value = loss(y)
        found.append((value.item(), gradient(value, nn.ModuleList([model, guide]))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


class Small(Params):
    """Two coins that the guide draws and a chain of three coins that the model lists, small enough to list by hand."""

    def __init__(self):
        super().__init__(steps=[[0.3, -0.4], [0.1, 0.9]], means=[-0.5, 1.0], weight=0.6)

    def forward(self):
        a = pyro.sample("a", dist.Bernoulli(logits=self.weight))
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(logits=self.weight * a))
            z = torch.tensor(0)
            for i in pyro.markov(range(2)):
                z = pyro.sample(f"z{i}", dist.Categorical(logits=self.steps[z] * (1 + a).unsqueeze(-1)), infer=PARALLEL)
                y = t([0.3, -1.0], [1.4, 0.2])[i]
                pyro.sample(f"y{i}", dist.Normal(Vindex(self.means)[z] + self.weight * b, 1.0), obs=y)


class SmallGuide(Params):
    def __init__(self):
        super().__init__(of_a=0.4, of_b=[0.3, -0.6], tie=0.5)

    def forward(self):
        a = pyro.sample("a", dist.Bernoulli(logits=self.of_a))
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(logits=self.of_b + self.tie * a))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("score", {}),
        ({"a": "score", "b": "enumerate"}, {}),
        ("enumerate", {}),
        ({"a": "enumerate", "b": "rloo"}, {"num_particles": 2}),
        ({"a": "local-expectation", "b": "score"}, {}),
        ("score", {"vectorize_particles": False}),
        ("rloo", {"num_particles": 2}),
    ],
)
def test_the_mean_over_every_tuple_of_draws_is_the_exact_gradient(words, options):
    model, guide = Small(), SmallGuide()
    found = mean_gradient(words, model, guide, **options)
    assert torch.allclose(found, exact_gradient(model, guide), rtol=0, atol=1e-10)


@pytest.mark.parametrize("word", ["score", "rloo"])
def test_under_iwae_the_mean_over_every_pair_of_draws_is_the_exact_gradient(word, param_store):
    model, guide = Small(), SmallGuide()
    exact = gradient(-exact_iwae(model, guide, num_particles=2), nn.ModuleList([model, guide]))
    found = mean_gradient(word, model, guide, objective="iwae", num_particles=2, plates="ignore")
    assert torch.allclose(found, exact, rtol=0, atol=1e-10)


def test_a_normal_site_beside_a_chain_has_the_gradient_of_a_quadrature():
    chain, y = Chain(2), randn(4, seed=12)
    guide = Params(loc=0.3, log_scale=-0.2)

    def draw(y):
        pyro.sample("shift", dist.Normal(guide.loc, guide.log_scale.exp()))

    def model(y):
        chain(y, shift=pyro.sample("shift", dist.Normal(t(0.0), 1.0)))

    def bound():
        q = dist.Normal(guide.loc, guide.log_scale.exp())
        nodes = torch.linspace(-9, 9, 4001, dtype=F64)
        shift = guide.loc + guide.log_scale.exp() * nodes
        inside = forward(chain.steps, dist.Normal(chain.means + shift[:, None], 1.0).log_prob(y[:, None, None]))
        weights = dist.Normal(t(0.0), 1.0).log_prob(nodes).exp() * (nodes[1] - nodes[0])
        return (weights * (inside + dist.Normal(t(0.0), 1.0).log_prob(shift) - q.log_prob(shift))).sum()

    both = nn.ModuleList([chain, guide])
    loss = SiteELBO(num_particles=400)
    with pyro.get_param_store().scope():
        draws = [gradient(loss.differentiable_loss(model, draw, y), both) for _ in range(150)]
        truth = gradient(-bound(), both)
    assert not misses(torch.stack(draws), truth, 0.25)


# What no elimination serves: listed jointly where that is possible, and otherwise refused in one line.


def test_rows_that_a_program_mixes_are_listed_jointly():
    """x_i depends on the states of all rows, which no dimension of a tensor shows."""
    logits = nn.Parameter(t(0.3, -0.4))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=logits[0]), infer=PARALLEL)
            total = z.expand(torch.broadcast_shapes(z.shape, (3,))).sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(total * logits[1], 1.0), obs=t(0.2, -0.4, 1.0))

    for options in ({}, {"plates": "ignore"}):
        value, exact = SiteELBO(**options)(model, nothing)(), -exact_elbo(model, nothing)
        assert value.item() == pytest.approx(exact.item(), rel=1e-12)
        assert close(*(torch.autograd.grad(one, logits)[0] for one in (value, exact)))
    with pytest.raises(UnsupportedSite, match="'x'.*between all values at once and single ones of 'z'"):
        SiteELBO(plates="trust")(model, nothing)()


def test_a_term_outside_a_plate_has_the_sites_in_it_listed_jointly():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(t(0.3)), infer=PARALLEL)
        pyro.sample("x", dist.Normal((z * t(1.0, 2.0, 3.0)).sum(-1, keepdim=True), 1.0), obs=t(2.0))

    assert SiteELBO()(model, nothing)().item() == pytest.approx(-exact_elbo(model, nothing).item(), rel=1e-12)


def test_crossing_plates_are_listed_jointly():
    """An observation for each pair of a row and a column, each with a state of its own."""
    y = randn(3, 2, seed=13)

    def model():
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(t(0.3)), infer=PARALLEL)
        with columns:
            b = pyro.sample("b", dist.Bernoulli(t(0.6)), infer=PARALLEL)
        with rows, columns:
            pyro.sample("y", dist.Normal(a + 2 * b, 1.0), obs=y)

    assert SiteELBO()(model, nothing)().item() == pytest.approx(-exact_elbo(model, nothing).item(), rel=1e-12)


def test_a_sum_that_pyro_refuses_without_a_plate_to_blame_is_refused_in_one_line(monkeypatch):
    """No program is known that comes there."""

    def refuses(*args, **kwargs):
        raise NotImplementedError("Expected something else\nand more")

    monkeypatch.setattr(elimination, "contract_tensor_tree", refuses)
    with pytest.raises(UnsupportedSite) as said:
        SiteELBO()(chain_of(lambda z: ROWS[z[-1]]), nothing)()
    assert str(said.value) == "site 'z3': Expected something else"


def chain_of(step, observe=True):
    def model():
        z = [torch.tensor(0)]
        for i in pyro.markov(range(4)):
            z.append(pyro.sample(f"z{i}", dist.Categorical(step(z)), infer=PARALLEL))
            if observe:
                pyro.sample(f"y{i}", dist.Normal(z[-1] * 1.0, 1.0), obs=t(0.5))

    return model


ROWS = t([0.3, 0.7], [0.6, 0.4])


def hidden_from_markov():
    return chain_of(lambda z: ROWS[z[max(0, len(z) - 2)]])()


def branching():
    z = pyro.sample("z", dist.Bernoulli(t(0.3)), infer=PARALLEL)
    pyro.sample("x", dist.Normal(1.0 if z > 0.5 else t(0.0), 1.0), obs=t(0.4))


def mixing_values():
    z = pyro.sample("z", dist.Categorical(t(0.2, 0.3, 0.5)), infer=PARALLEL)
    pyro.sample("x", dist.Normal(z.double().mean(), 1.0), obs=t(0.4))


def counting():
    z = pyro.sample("z", dist.Poisson(t(2.0)), infer=PARALLEL)
    pyro.sample("x", dist.Normal(z, 1.0), obs=t(0.4))


def in_sequence():
    pyro.sample("z", dist.Bernoulli(t(0.3)), infer={"enumerate": "sequential"})


def of_some_draws():
    pyro.sample("z", dist.Bernoulli(t(0.3)), infer={"enumerate": "parallel", "num_samples": 4})


def unmarked():
    pyro.sample("z", dist.Bernoulli(t(0.3)))


def outside_a_subsample():
    z = pyro.sample("z", dist.Bernoulli(t(0.3)), infer=PARALLEL)
    with pyro.plate("data", 6, subsample_size=2):
        pyro.sample("x", dist.Normal(z, 1.0), obs=t(0.4, 0.2))


def outside_a_sequential_subsample():
    z = pyro.sample("z", dist.Bernoulli(t(0.3)), infer=PARALLEL)
    for i in pyro.plate("data", 6, subsample_size=2):
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=t(0.4))


def scaled_apart():
    z = pyro.sample("z", dist.Bernoulli(t(0.3)), infer=PARALLEL)
    with poutine.scale(scale=3.0):
        pyro.sample("x", dist.Normal(z, 1.0), obs=t(0.4))


def without_markov():
    z = torch.tensor(0)
    for i in range(80):
        z = pyro.sample(f"z{i}", dist.Categorical(ROWS[z]), infer=PARALLEL)


def in_full(count=40):
    """Every state depends on all others."""
    z = [pyro.sample(f"z{i}", dist.Bernoulli(t(0.3)), infer=PARALLEL) for i in range(count)]
    for i, one in enumerate(z):
        for other in z[:i]:
            pyro.sample(f"x{i}_{len(z)}_{id(other)}", dist.Normal(one + other, 1.0), obs=t(0.4))


def too_many_rows():
    with pyro.plate("data", 40):
        z = pyro.sample("z", dist.Bernoulli(t(0.3)), infer=PARALLEL)
    pyro.sample("x", dist.Normal((z * torch.ones(40)).sum(-1, keepdim=True), 1.0), obs=t(2.0))


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (branching, {}, "'z'.*fails with RuntimeError.*draw these sites in the guide"),
        (mixing_values, {}, "'x'.*between all values at once and single ones of 'z'"),
        (counting, {}, "'z'.*Poisson has no finite support; draw it in the guide"),
        (in_sequence, {}, "'z'.*'sequential'.*mark it 'parallel'"),
        (of_some_draws, {}, "'z'.*num_samples"),
        (unmarked, {}, "'z'.*no site in the guide.*mark it"),
        (outside_a_subsample, {}, "'z'.*outside the subsampled plate 'data'"),
        (outside_a_sequential_subsample, {}, "'z'.*outside the subsampled plate 'data'"),
        (scaled_apart, {}, "'x'.*its scale is 3 where that of 'z' is 1"),
        (without_markov, {}, "'z5.'.*pyro.markov"),
        (in_full, {}, "summing over 'z.*needs .*iB at once, more than the limit of 4 GiB.*pyro.markov"),
        (lambda: Chain(16)(randn(8)), {"memory_limit": 2.0**-20}, "needs .*KiB at once, more than the limit of 1 KiB"),
        (lambda: chain_of(lambda z: ROWS[z[-1]])(), {"kl_weight": 0.5}, "'z0'.*kl_weight"),
        (lambda: chain_of(lambda z: ROWS[z[-1]])(), {"kl_weight": lambda step: 1.0}, "'z0'.*kl_weight"),
        (lambda: chain_of(lambda z: ROWS[z[-1]])(), {"estimators": {"z1": "rloo"}}, "'z1'.*'rloo'.*sums over it"),
    ],
)
def test_what_no_elimination_serves_is_refused_in_one_line(model, options, says):
    with pytest.raises(GumboError, match=says) as caught:
        SiteELBO(**options)(model, nothing)()
    assert "\n" not in str(caught.value)


def test_a_state_that_reads_one_that_markov_hides_is_refused():
    with pytest.raises(UnsupportedSite, match="history=") as caught:
        SiteELBO()(hidden_from_markov, nothing)()
    assert "\n" not in str(caught.value)


def test_elements_of_a_sequential_plate_share_one_dimension_without_markov():
    y = randn(80, seed=14)

    def model():
        for i in pyro.plate("data", 80):
            z = pyro.sample(f"z{i}", dist.Bernoulli(t(0.3)), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=y[i])

    exact = torch.stack(
        [t(0.7).log() + dist.Normal(t(0.0), 1.0).log_prob(y), t(0.3).log() + dist.Normal(t(1.0), 1.0).log_prob(y)]
    )
    assert SiteELBO()(model, nothing)().item() == pytest.approx(-exact.logsumexp(0).sum().item(), rel=1e-12)


def test_a_second_loop_sees_the_same_elements_of_a_first_one_that_is_too_long_for_a_dimension_each():
    y = randn(80, seed=14)

    def model():
        rows = pyro.plate("rows", 80)
        z = [pyro.sample(f"z{i}", dist.Bernoulli(t(0.3)), infer=PARALLEL) for i in rows]
        for i in rows:
            pyro.sample(f"y{i}", dist.Normal(z[i], 1.0), obs=y[i])

    seen = dist.Normal(t(0.0, 1.0), 1.0).log_prob(y[:, None]) + t(0.7, 0.3).log()
    assert SiteELBO()(model, nothing)().item() == pytest.approx(-seen.logsumexp(-1).sum().item(), rel=1e-12)


def tied(outer, inner):
    """Model and guide of Pyro's tests in which a coin outside of a plate meets the sites that the guide lists in it."""
    params = Params(a=0.3, b=[0.4, -0.2], c=[[0.5, -0.7], [0.2, 0.9]], q=[0.6, -0.3])
    y = t([0.0, 1.0], [1.0, 1.0])

    def model():
        within = pyro.plate("inner", 2)
        a = pyro.sample("a", dist.Bernoulli(logits=params.a), infer=PARALLEL).long()
        for i, rows in elements(pyro.plate("outer", 2), outer):
            b = pyro.sample(f"b{i}", dist.Categorical(logits=params.b), infer=PARALLEL)
            for j, columns in elements(within, inner):
                seen = y[rows][..., columns]
                seen = seen.T if outer and inner else seen
                pyro.sample(f"c{i}{j}", dist.Bernoulli(logits=Vindex(params.c)[a, b]), obs=seen)

    def guide():
        for i, _ in elements(pyro.plate("outer", 2), outer):
            pyro.sample(f"b{i}", dist.Categorical(logits=params.q), infer=PARALLEL)

    return params, model, guide


def elements(plate, vectorized):
    """Two elements one by one, or both at once: what to call them, and which they are."""
    if not vectorized:
        yield from ((i, i) for i in plate)
        return
    with plate:
        yield "", slice(None)


@pytest.mark.parametrize(("outer", "inner"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_sum_that_ties_the_elements_that_the_guide_lists_has_them_listed_jointly(outer, inner):
    params, model, guide = tied(outer, inner)
    with pyro.get_param_store().scope():
        value, exact = SiteELBO().differentiable_loss(model, guide), -exact_elbo(model, guide)
    assert value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert torch.allclose(gradient(value, params), gradient(exact, params), rtol=0, atol=1e-10)


def test_a_subsampled_plate_of_chains_is_scaled_outside_the_sum(param_store):
    chain, y = Chain(2), randn(6, 3, seed=15)

    def model(rows):
        with pyro.plate("sequences", 6, subsample=rows):
            chain(y[rows].T)

    rows = torch.tensor([1, 4])
    value = SiteELBO().loss(model, nothing, rows)
    assert value == pytest.approx(-3 * sum(evidence(chain, y[i]).item() for i in rows), rel=1e-12)


@pytest.mark.parametrize("name", ["chain_in_a_plate_with_lengths", "tree"])
def test_a_nesting_that_is_given_changes_nothing(name):
    programs = Programs()
    found, given = (SiteELBO(max_plate_nesting=n)(model_of(programs, name), nothing)().item() for n in (None, 3))
    assert given == pytest.approx(found, rel=1e-12)


def test_svi_trains_a_chain(param_store):
    chain, y = Chain(2), 3 * randn(12, seed=16)
    svi = pyro.infer.SVI(chain, nothing, pyro.optim.Adam({"lr": 0.05}), loss=SiteELBO())
    before = svi.step(y)
    for _ in range(20):
        svi.step(y)
    assert svi.evaluate_loss(y) < before - 1
    assert svi.evaluate_loss(y) == pytest.approx(-evidence(chain, y).item(), rel=1e-9)


def test_several_processes_refuse_a_sum_outside_the_rows_and_take_one_inside():
    class Rowwise(pyro.nn.PyroModule):
        def __init__(self, outside):
            super().__init__()
            self.chain, self.outside = Chain(2), outside

        def forward(self, y):
            c = pyro.sample("c", dist.Bernoulli(t(0.3)), infer=PARALLEL) if self.outside else 0.0
            with pyro.plate("data", len(y)):
                self.chain(y.T, shift=c)

    for outside in (False, True):
        model, guide, y = Rowwise(outside), Nothing(), randn(5, 3, seed=17)
        loss = SiteELBO()
        module = loss(model, guide).initialize(y)
        with pytest.raises(UnsupportedSite, match="one process") if outside else nullcontext():
            refuse(loss, module, study(model, guide, Rows(y)))


class Nothing(pyro.nn.PyroModule):
    def forward(self, *args):
        pass


def test_an_audit_beside_a_chain_that_is_too_long_to_list():
    chain, y = Chain(2), randn(20, seed=18)
    coin = Params(coin=0.3)

    class Beside(pyro.nn.PyroModule):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def forward(self, y):
            if self.of is coin:
                pyro.sample("s", dist.Bernoulli(logits=coin.coin))
            else:
                chain(y, shift=pyro.sample("s", dist.Bernoulli(t(0.4))))

    report = audit(Beside(chain), Beside(coin), y, estimators=["score"], num_samples=60)
    assert report.attrs["reference"].startswith("exact")
    assert set(report["verdict"].values) == {"ok"}


def test_the_word_enumerate_may_be_said_of_what_the_model_sums_over():
    model = chain_of(lambda z: ROWS[z[-1]])
    assert SiteELBO({"z1": "enumerate"})(model, nothing)().item() == SiteELBO()(model, nothing)().item()


def test_a_plan_is_linear_in_the_length_of_a_chain():
    def numbers(length):
        names = [chr(200 + i) for i in range(length + 1)]
        factors = tuple(names[0] if i == 0 else names[i - 1] + names[i] for i in range(length))
        return contraction.plan(factors, tuple((4,) * len(f) for f in factors), frozenset("".join(factors))).numbers

    assert numbers(200) - numbers(100) == numbers(300) - numbers(200) == 100 * 16


def calls_of(run):
    """The number of Python's calls and resumptions and of C calls while ``run()`` runs."""
    count = 0

    def see(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_of_a_step_is_linear_in_the_length_of_a_chain():
    def calls(length):
        chain, y = Chain(4), randn(length)
        loss = SiteELBO()(chain, nothing)

        def step():
            loss(y).backward()

        step()  # the first one makes plans
        gc.collect()
        gc.disable()
        try:
            return calls_of(step)
        finally:
            gc.enable()

    short, longer, longest = calls(20), calls(40), calls(80)
    assert longest - longer == pytest.approx(2 * (longer - short), abs=50)  # the ends cost their own


# Chains of the guide: the terms of the bound, expected over them by elimination.


class ChainGuide(Params):
    """A chain of its own over the states of `Chain`."""

    def __init__(self, states=3, length=4):
        super().__init__()
        self.q_start = nn.Parameter(randn(states, seed=20))
        self.q_steps = nn.Parameter(randn(length, states, states, seed=21))

    def forward(self, y, shift=0.0):
        z = None
        for i in pyro.markov(range(len(y))):
            logits = self.q_start if z is None else self.q_steps[i][z]
            z = pyro.sample(f"z{i}", dist.Categorical(logits=logits), infer=PARALLEL)


def bound_over(chain, guide, y):
    """E[log p − log q] of `Chain` under `ChainGuide`, by its marginals one after the other."""
    seen = dist.Normal(chain.means, 1.0).log_prob(y[:, None])
    prior, log_q = chain.steps.log_softmax(-1), guide.q_start.log_softmax(-1)
    now = log_q.exp()
    total = (now * (prior[0] + seen[0] - log_q)).sum()
    for i in range(1, len(y)):
        log_q = guide.q_steps[i].log_softmax(-1)
        joint = now[:, None] * log_q.exp()
        total = total + (joint * (prior + seen[i] - log_q)).sum()
        now = joint.sum(0)
    return total


@pytest.mark.parametrize("length", [4, 60])
def test_a_chain_of_the_guide_has_the_expectation_over_its_marginals(length):
    chain, guide, y = Chain(3), ChainGuide(3, length), 3 * randn(length, seed=22)
    loss = SiteELBO()(chain, guide)
    both = nn.ModuleList([chain, guide])
    value, exact = loss(y), -bound_over(chain, guide, y)
    assert loss.binding.lists_chains
    assert value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert close(gradient(value, both), gradient(exact, both), 1e-10)


class BesideGuide(Params):
    """A coin, a chain in a plate that depends on it, and a coin of each row: before, after, or fed by the chain."""

    def __init__(self, last):
        super().__init__(coin=0.3, start=[[0.2, -0.1], [0.5, 0.3]], move=[[0.4, -0.3], [-0.2, 0.6]], row=[0.1, -0.4])
        self.last = last

    def forward(self):
        coin = pyro.sample("a", dist.Bernoulli(logits=self.coin))
        with pyro.plate("data", 2):
            if self.last == "before":
                pyro.sample("b", dist.Bernoulli(logits=self.row))
            z = None
            for i in pyro.markov(range(2)):
                logits = Vindex(self.start)[coin.long()] if z is None else Vindex(self.move)[z]
                z = pyro.sample(f"z{i}", dist.Categorical(logits=logits), infer=PARALLEL)
            if self.last != "before":
                pyro.sample("b", dist.Bernoulli(logits=self.row + (z if self.last == "fed" else 0)))


@pytest.mark.parametrize(
    ("words", "options", "last"),
    [
        ({"*": "score"}, {}, "before"),
        ({"*": "score"}, {}, "after"),
        ({"*": "score"}, {}, "fed"),
        ({"a": "enumerate", "b": "score"}, {}, "after"),
        ({"a": "enumerate", "b": "rloo"}, {"num_particles": 2}, "before"),
        ({"*": "score"}, {"plates": "ignore"}, "before"),
        ({"a": "local-expectation", "b": "score"}, {}, "after"),
    ],
)
def test_beside_a_chain_of_the_guide_the_mean_over_every_draw_is_the_exact_gradient(words, options, last):
    model, guide = Small(), BesideGuide(last)
    loss = SiteELBO(words, **options)(model, guide).initialize()
    assert loss.binding.lists_chains == (last != "fed")  # what is drawn for each of its values is listed as before
    found = mean_gradient(words, model, guide, **options)
    assert torch.allclose(found, exact_gradient(model, guide), rtol=0, atol=1e-10)


def test_a_weight_of_the_latent_terms_reaches_chains_of_the_guide():
    chain, guide, y = Chain(2), ChainGuide(2, 3), randn(3, seed=23)
    both = nn.ModuleList([chain, guide])
    chained, listed = (
        SiteELBO(kl_weight=0.3, vectorize_particles=together)(chain, guide)(y) for together in (True, False)
    )
    assert chained.item() == pytest.approx(listed.item(), rel=1e-12)
    assert close(gradient(chained, both), gradient(listed, both))


def test_model_and_guide_may_each_list_a_chain():
    y = randn(3, seed=24)
    chain, guide = Chain(2), ChainGuide(2, 3)

    def model(y):
        z = w = torch.tensor(0)
        for i in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{i}", dist.Categorical(logits=chain.steps[z]))
            w = pyro.sample(f"w{i}", dist.Categorical(logits=Vindex(chain.steps)[(w + z) % 2]), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Normal(chain.means[w] + z, 1.0), obs=y[i])

    loss = SiteELBO()
    with pyro.get_param_store().scope():
        value = loss.differentiable_loss(model, guide, y)
        exact = -exact_elbo(model, guide, y)
    assert value.item() == pytest.approx(exact.item(), rel=1e-12)
    both = nn.ModuleList([chain, guide])
    assert close(gradient(value, both), gradient(exact, both))


def test_a_chain_that_reaches_further_back_in_the_model_than_in_the_guide_is_listed():
    guide = ChainGuide(2, 4)
    steps = nn.Parameter(randn(2, 2, 2, seed=25))

    def model(y):
        z = before = torch.tensor(0)
        for i in pyro.markov(range(len(y)), history=2):
            z, before = pyro.sample(f"z{i}", dist.Categorical(logits=Vindex(steps)[before, z])), z
            pyro.sample(f"y{i}", dist.Normal(z.double(), 1.0), obs=y[i])

    y = randn(4, seed=26)
    with pyro.get_param_store().scope():
        value, exact = SiteELBO().differentiable_loss(model, guide, y), -exact_elbo(model, guide, y)
    assert value.item() == pytest.approx(exact.item(), rel=1e-12)


# Memory: what is listed, by the model or by the guide, is counted in bytes before it is made.


def switches(count=20, infer=None):
    """Coins that one observation reads together: 2 to the power of ``count`` combinations."""
    z = [pyro.sample(f"z{i}", dist.Bernoulli(t(0.3)), infer=infer or {}) for i in range(count)]
    pyro.sample("x", dist.Normal(sum(z).unsqueeze(-1) + torch.zeros(8), 1.0).to_event(1), obs=t([0.4] * 8))


def guessed(count=20):
    for i in range(count):
        pyro.sample(f"z{i}", dist.Bernoulli(t(0.3)))


def in_rows(states=16, rows=64):
    with pyro.plate("data", rows):
        z = pyro.sample("z", dist.Categorical(torch.ones(states).double()))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + torch.zeros(rows, 8).double(), 1.0).to_event(1), obs=t(0.4))


def in_rows_guide(states=16, rows=64):
    with pyro.plate("data", rows):
        pyro.sample("z", dist.Categorical(torch.ones(states).double()))


GIB = 2.0**-30


@pytest.mark.parametrize(
    ("model", "guide", "options", "says"),
    [
        # 2^20 combinations, 8 numbers of 8 bytes, and as much for the gradient
        (
            switches,
            guessed,
            {"memory_limit": 0.0625},
            "'z0', 'z1', .*needs 128 MiB at once, more than the limit of 64 MiB",
        ),
        # x: 16 states, 64 rows, 8 numbers, 8 bytes, twice
        (
            in_rows,
            in_rows_guide,
            {"memory_limit": 128 * 2**10 * GIB},
            "over 'z' needs 1.. KiB at once, more than.*128 K",
        ),
        (
            lambda: switches(13, PARALLEL),
            nothing,
            {"memory_limit": 2**20 * GIB},
            "over 'z0', .* needs .*iB at once, more",
        ),
        (too_many_rows, nothing, {}, r"over 'z' needs .*TiB at once, more than the limit of 4 GiB"),
    ],
    ids=["guide", "rows", "model", "joint"],
)
def test_a_list_that_needs_more_memory_than_its_limit_is_refused_before_it_is_made(model, guide, options, says):
    with pytest.raises(TooMuchMemory, match=says) as caught:
        SiteELBO("enumerate", **options)(model, guide)()
    assert "\n" not in str(caught.value) and "rloo" in str(caught.value)


def test_combinations_are_limited_by_their_bytes_and_not_by_their_number():
    model, guide = (lambda: switches(15)), (lambda: guessed(15))
    count, seen = torch.arange(16).double(), t(0.4)
    weights = dist.Binomial(15, t(0.3)).log_prob(count).exp()
    exact = (weights * 8 * dist.Normal(count, 1.0).log_prob(seen)).sum()
    assert SiteELBO("enumerate")(model, guide)().item() == pytest.approx(-exact.item(), rel=1e-9)
    with pytest.raises(UnsupportedSite, match="128 combinations.*limit of 100"):
        SiteELBO(Enumerate(limit=100))(model, guide)()
    with pytest.raises(UnsupportedSite, match="more than the limit"):  # one by one it is the number that counts
        SiteELBO("enumerate", vectorize_particles=False)(model, guide)()
    small = SiteELBO("enumerate", memory_limit=1.0)(model, guide)
    assert small().isfinite()


def test_sums_of_many_parts_are_counted_together():
    """Forty pairs of states, one pair after the other: each sum fits, all of them do not."""

    def model():
        for i in pyro.plate("pairs", 40):
            a = pyro.sample(f"a{i}", dist.Categorical(torch.ones(16).double()), infer=PARALLEL)
            b = pyro.sample(f"b{i}", dist.Categorical(torch.ones(16).double()), infer=PARALLEL)
            pyro.sample(f"y{i}", dist.Normal((a + b).double(), 1.0), obs=t(0.4))

    assert SiteELBO(memory_limit=400 * 2**10 * GIB)(model, nothing)().isfinite()
    with pytest.raises(TooMuchMemory, match="more than the limit of 100 KiB"):
        SiteELBO(memory_limit=100 * 2**10 * GIB)(model, nothing)()


class Matched(Params):
    """Two noisy looks at the place of the first of three things, each under an assignment of its own."""

    def __init__(self, infer):
        super().__init__()
        self.edges = nn.Parameter(randn(3, 3))
        self.infer, self.y = infer, t(0.2, 1.7)

    def forward(self):
        with pyro.plate("looks", 2):
            match = pyro.sample("match", dist.OneOneMatching(self.edges), infer=self.infer)
            pyro.sample("y", dist.Normal(match[..., 0].to(F64), 1.0), obs=self.y)

    def terms(self):
        """The six assignments, their log-probabilities ``(6,)``, and those of the looks under them, ``(2, 6)``."""
        values = torch.tensor(list(itertools.permutations(range(3))))
        prior = self.edges[torch.arange(3), values].sum(-1).log_softmax(0)
        return values, prior, dist.Normal(values[:, 0].to(F64), 1.0).log_prob(self.y.unsqueeze(-1))


class MatchedGuide(Params):
    def __init__(self):
        super().__init__()
        self.links = nn.Parameter(randn(3, 3, seed=1))

    def forward(self):
        with pyro.plate("looks", 2):
            pyro.sample("match", dist.OneOneMatching(self.links))


def test_assignments_in_a_plate_are_summed_out():
    # Pyro expands the distribution to the plate, and its list of an expanded event has the wrong shape.
    model = Matched(PARALLEL)
    loss = SiteELBO("pathwise")(model, nothing)()
    _, prior, terms = model.terms()
    exact = -(prior + terms).logsumexp(-1).sum()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, model.edges), torch.autograd.grad(exact, model.edges))


@pytest.mark.parametrize("word", ["enumerate", "local-expectation", "rloo"])
def test_assignments_in_a_plate_are_drawn_or_enumerated(word):
    model, guide = Matched({}), MatchedGuide()
    options = {"num_particles": 2, "vectorize_particles": True} if word == "rloo" else {}
    found = mean_gradient(word, model, guide, **options)
    values, prior, terms = model.terms()
    q = guide.links[torch.arange(3), values].sum(-1).log_softmax(0)
    exact = (q.exp() * (q - prior - terms)).sum()
    wanted = torch.cat([one.flatten() for one in torch.autograd.grad(exact, [model.edges, guide.links])])
    torch.testing.assert_close(found, wanted)

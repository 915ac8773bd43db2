"""How many particles, alternatives and enumerated values are run at once, and what programs do not take so."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient
from programs import DISCRETE, F64, Params, X, gradient
from pyro.infer.autoguide import AutoNormal
from torch import nn

from gumbo.errors import CannotVectorize, GumboWarning, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import mean_over_draws

# One particle, enumerated.


class OnlyOne(Params):
    """A mixture whose guide has globals that are drawn and assignments that are enumerated; it takes one particle."""

    def __init__(self, model):
        super().__init__(**({} if model else {"w": 0.7, "logits": [0.2, -0.1]}))
        self.is_model = model

    def forward(self):
        if self.is_model:
            locs = pyro.sample("locs", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Categorical(logits=torch.zeros(2, dtype=F64)))
                assert locs.shape == (2,)
                pyro.sample("x", dist.Normal(locs[z], 1.0), obs=torch.tensor([0.1, 0.2, -1.0], dtype=F64))
        else:
            pyro.sample("locs", dist.Normal(self.w.expand(2), 1.0).to_event(1))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Categorical(logits=self.logits))


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True}, {"num_particles": 1}])
def test_enumeration_with_one_particle_asks_for_no_second(options):
    loss = SiteELBO({"locs": "pathwise", "z": "enumerate"}, **options)(OnlyOne(True), OnlyOne(False))
    assert loss().requires_grad
    with pytest.raises(CannotVectorize, match="vectorize_particles=False"):
        SiteELBO({"locs": "pathwise", "z": "enumerate"}, num_particles=2, vectorize_particles=True)(
            OnlyOne(True), OnlyOne(False)
        )()


def test_alternatives_one_by_one_beside_enumerated_values():
    class Model(Params):
        def forward(self):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.4, dtype=F64)))
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
                assert y.numel() == 1  # as `if y` or `y.item()` would have it
                pyro.sample("x", dist.Normal(z + y.reshape(()), 1.0), obs=X)

    class Guide(Params):
        def __init__(self):
            super().__init__(a=0.3, b=-0.2)

        def forward(self):
            pyro.sample("y", dist.Bernoulli(logits=self.a))
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Bernoulli(logits=self.b))

    model, guide = Model(), Guide()
    loss = SiteELBO({"y": "local-expectation", "z": "enumerate"})(model, guide).initialize()
    mean = mean_over_draws(lambda: gradient(loss(), guide))
    assert torch.allclose(mean, exact_gradient(model, guide)[-2:], rtol=0, atol=1e-10)


# The limit on listed values.


def coins(count):
    def program():
        z = 0.0
        for i in range(count):
            z = z + pyro.sample(f"z{i}", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))

    return program


@pytest.mark.parametrize("vectorize", [pytest.param(None, marks=pytest.mark.slow), True, False])
def test_the_limit_on_listed_values_is_one_for_the_program(vectorize):
    start = time.monotonic()
    says = (
        "combinations .* limit of 16384" if vectorize is False else "needs 8 GiB at once, more than the limit of 4 GiB"
    )
    with pytest.raises(UnsupportedSite, match=f"'z0', 'z1'.* {says}"):
        SiteELBO("enumerate", vectorize_particles=vectorize).loss(coins(40), coins(40))
    assert time.monotonic() - start < 60
    assert SiteELBO("enumerate", vectorize_particles=vectorize).loss(coins(6), coins(6)) == pytest.approx(0, abs=1e-9)


def test_values_of_plates_that_lie_apart_are_not_multiplied():
    def program():
        for name in "abc":
            with pyro.plate(f"plate {name}", 2):
                pyro.sample(name, dist.Categorical(torch.ones(100, dtype=F64)))

    assert SiteELBO("enumerate").loss(program, program) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("goes_on", [0, 1])
def test_a_geometric_variable_without_a_bound_cannot_be_listed(goes_on):
    def program():
        i = 0
        while pyro.sample(f"z{i}", dist.Bernoulli(torch.tensor(0.5, dtype=F64))) == goes_on:
            i += 1

    with pytest.raises(UnsupportedSite, match="th enumerated site of one run.*an unbounded loop"):
        SiteELBO("enumerate", vectorize_particles=False).loss(program, program)


def test_a_bounded_geometric_variable_is_listed():
    def program():
        for i in range(20):
            if pyro.sample(f"z{i}", dist.Bernoulli(torch.tensor(0.5, dtype=F64))) == 0:
                break

    assert SiteELBO("enumerate", vectorize_particles=False).loss(program, program) == pytest.approx(0, abs=1e-9)


# Programs for one particle.


class Regression(Params):
    def __init__(self, model):
        super().__init__(**({} if model else {"loc": [0.3, -0.2]}))
        self.is_model = model

    def forward(self, x, y):
        if self.is_model:
            w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
        else:
            pyro.sample("w", dist.Normal(self.loc, 1.0).to_event(1))


def simulator(model):
    class Simulator(Params):
        def __init__(self):
            super().__init__(**({} if model else {"a": 0.3}))

        def forward(self):
            if model:
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
                moved = torch.as_tensor(np.sin(float(z.numpy())), dtype=F64)
                pyro.sample("x", dist.Normal(moved, 1.0), obs=X[0])
            else:
                pyro.sample("z", dist.Normal(self.a, 1.0))

    return Simulator()


DATA = torch.tensor([[0.1, 0.2], [1.0, -1.0], [0.4, 2.0]], dtype=F64), torch.tensor([0.0, 1.0, -1.0], dtype=F64)
FOR_ONE = {
    "X @ w": (Regression(True), Regression(False), DATA, ["pathwise", "stl", "score", "rloo"]),
    "numpy": (simulator(True), simulator(False), (), ["score", "rloo", "score-average", "nvil"]),
}


@pytest.mark.parametrize("word", ["pathwise", "stl", "score", "rloo", "score-average", "nvil"])
@pytest.mark.parametrize("case", FOR_ONE)
@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_programs_for_one_particle_are_run_one_by_one(case, word, objective):
    model, guide, data, words = FOR_ONE[case]
    if word not in words or (word == "stl" and objective == "iwae"):
        pytest.skip("not a word for this program")
    found = []
    for vectorize in (None, False):
        pyro.set_rng_seed(5)
        loss = SiteELBO(word, objective=objective, num_particles=3, vectorize_particles=vectorize)(model, guide)
        if vectorize is None:
            with pytest.warns(GumboWarning, match="particles are run one by one") as said:
                loss.initialize(*data)
            assert len(said) == 1
        else:
            loss.initialize(*data)
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter("error")
            found.append(torch.cat([gradient(loss(*data), guide) for _ in range(2)]))
    assert torch.equal(*found)
    with pytest.raises(CannotVectorize, match="vectorize_particles=False"):
        SiteELBO(word, objective=objective, num_particles=3, vectorize_particles=True)(model, guide)(*data)


@pytest.mark.parametrize("word", ["enumerate", "rloo", "local-expectation", "disarm"])
def test_control_flow_is_run_one_by_one(word):
    model, guide = DISCRETE["control flow"].make()
    both = nn.ModuleList([model, guide])
    loss = SiteELBO(word)(model, guide)
    if word == "disarm":  # its alternatives are no more than one, and its uniforms cannot be listed
        assert loss().requires_grad
        return
    with pytest.warns(GumboWarning, match="are run one by one") if word in ("enumerate", "rloo") else nullcontext():
        loss.initialize()
    assert torch.allclose(
        mean_over_draws(lambda: gradient(loss(), both)), exact_gradient(model, guide), rtol=0, atol=1e-10
    )


# Enumerated values that a statement moves to where others stand.


class Moved(Params):
    """A global coin and one for each row; an ``unsqueeze`` puts the first where the second has its values."""

    def __init__(self, observed):
        super().__init__(**({"w": 0.7} if observed else {"a": [0.4, 0.1], "b": 0.3}))
        self.observed = observed

    def forward(self):
        prior = self.observed
        g = pyro.sample("g", dist.Bernoulli(logits=torch.tensor(-0.2, dtype=F64) if prior else self.b))
        beside = g.unsqueeze(-1) if g.dim() else g
        with pyro.plate("data", 2):
            logits = 0.5 * beside + (torch.zeros(2, dtype=F64) if prior else self.a)
            z = pyro.sample("z", dist.Bernoulli(logits=logits))
            if prior:
                pyro.sample("x", dist.Normal(self.w * z + beside, 1.0), obs=X)


class Summed(Params):
    """What stands outside the plate is a sum over its rows, which listed values do not have."""

    def __init__(self, observed):
        super().__init__(**({"w": 0.7} if observed else {"a": [0.4, 0.1]}))
        self.observed = observed

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, dtype=F64) if self.observed else self.a))
        if self.observed:
            total = pyro.deterministic("total", z.sum(-1))
            pyro.sample("x", dist.Normal(self.w * total, 1.0), obs=X[0])


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("program", [Moved, Summed])
def test_enumerated_values_that_are_moved_onto_others_are_run_one_by_one(program, num_particles):
    model, guide = program(True), program(False)
    loss = SiteELBO("enumerate", num_particles=num_particles)(model, guide)
    with pytest.warns(GumboWarning, match="run one by one"):
        loss.initialize()
    found = gradient(loss(), nn.ModuleList([model, guide]))
    torch.testing.assert_close(found, exact_gradient(model, guide), rtol=0, atol=1e-12)
    with pytest.raises((CannotVectorize, UnsupportedSite)):
        SiteELBO("enumerate", num_particles=num_particles, vectorize_particles=True)(model, guide)()


# Statements that read another particle's value.


class Reads(Params):
    """Coins whose model reads one of them by an index from the left, where particles stand."""

    def __init__(self, observed, index, size):
        super().__init__(**({} if observed else {"a": [1.5] * size}))
        self.observed, self.index, self.size = observed, index, size

    def forward(self):
        logits = torch.full((self.size,), -0.4, dtype=F64) if self.observed else self.a
        z = pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
        if self.observed:
            pyro.sample("x", dist.Normal(3 * z[self.index], 1.0), obs=X[0])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("index", "size", "num_particles"), [(-1, 1, 4), (-1, 1, 7), (0, 2, 2), (0, 3, 3)])
def test_a_value_of_another_particle_is_detected_at_every_draw(index, size, num_particles, seed):
    model, guide = Reads(True, index, size), Reads(False, index, size)
    pyro.set_rng_seed(seed)
    with pytest.warns(GumboWarning, match="particles are run one by one"):
        SiteELBO("rloo", num_particles=num_particles)(model, guide)()


@pytest.mark.parametrize("num_particles", [2, 7])
@pytest.mark.parametrize("case", [name for name, case in DISCRETE.items() if not case.branches])
def test_programs_for_many_particles_stay_at_once(case, num_particles, recwarn):
    model, guide = DISCRETE[case].make()
    SiteELBO("score", num_particles=num_particles)(model, guide)()
    assert not [said for said in recwarn if "one by one" in str(said.message)]


def guide_without_a_plate(x):
    pyro.sample("z", dist.Normal(torch.tensor(0.3, dtype=F64, requires_grad=True), 1.0))


def model_without_a_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("num_particles", [None, 4])
def test_later_rows_without_a_plate_are_no_particles(num_particles):
    loss = SiteELBO(num_particles=num_particles)(model_without_a_plate, guide_without_a_plate)
    loss(torch.ones(1, dtype=F64))
    with pytest.raises(UnsupportedSite, match="outside any plate"):
        loss(torch.ones(4, dtype=F64))


class Labelled(Params):
    """One-hot draws of two rows; a branch for labelled rows indexes from the left."""

    def __init__(self, observed):
        super().__init__(**({} if observed else {"a": [0.5, -1.0]}))
        self.observed = observed

    def forward(self, x, y=None):
        logits = torch.zeros(2, dtype=F64) if self.observed else self.a
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
            if self.observed:
                pyro.sample("x", dist.Normal(z[..., 1], 1.0), obs=x)
            if self.observed and y is not None:
                pyro.sample("y", dist.Normal(3 * z[torch.arange(len(x)), y], 1.0), obs=x)


def test_a_branch_of_a_later_call_is_compared_too():
    loss = SiteELBO("rloo", num_particles=2)(Labelled(True), Labelled(False))
    y = torch.tensor([1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(X)
    with pytest.warns(GumboWarning, match="particles are run one by one"):
        loss(X, y)
    strict = SiteELBO("rloo", num_particles=2, vectorize_particles=True)(Labelled(True), Labelled(False))
    strict(X)
    for _ in range(2):
        with pytest.raises(CannotVectorize):
            strict(X, y)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(2, 5), (7,)])
def test_an_automatic_guide_of_bounded_events_takes_all_particles_at_once(shape, seed):
    """A transform of one particle may round otherwise than of several, and a point has no density beside itself."""

    def model():
        law = dist.Uniform(torch.tensor(-0.5, dtype=F64), 20.5).expand(shape).to_event()
        total = pyro.sample("u", law).flatten(-len(shape)).sum(-1)
        pyro.sample("x", dist.Normal(total, 5.0), obs=torch.tensor(30.0, dtype=F64))

    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(seed)
        guide = AutoNormal(model)
        guide()
        assert math.isfinite(SiteELBO(num_particles=4, vectorize_particles=True).loss(model, guide))


@pytest.mark.parametrize("word", ["rloo", "double-cv", "rodeo"])
def test_a_point_that_follows_a_discrete_draw_takes_all_particles_at_once(word, param_store):
    """The comparison at other values kept the point of the values drawn, where it has no density."""

    def model():
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(torch.full((), 0.4, dtype=F64)))
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z + b, 1.0), obs=torch.tensor([0.9, -1.2, 1.7], dtype=F64))

    def guide():
        point = pyro.param("point", torch.tensor([0.4, -0.3, 0.8], dtype=F64))
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(3, dtype=F64))))
            pyro.sample("z", dist.Delta(point + b * point.cos()))

    SiteELBO({"b": word}, num_particles=2, vectorize_particles=True).loss(model, guide)

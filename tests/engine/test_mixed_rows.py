"""Rows that are mixed inside a plate: found by changing the draws of a row, then summed or refused."""

import contextlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient
from programs import F64, Params, gradient
from pyro.nn import PyroModule
from torch import nn
from ztest import misses

from gumbo.errors import BadInput, CannotVectorize, UnsupportedSite
from gumbo.inference import SiteELBO, audit
from gumbo.inference.auditing.exact import exact_elbo, mean_over_draws
from gumbo.inference.engine.looks import plates_mixed_by
from gumbo.inference.engine.mixing import _groups

X = torch.tensor([0.3, -0.8, 1.1], dtype=F64)


class Guide(Params):
    def __init__(self):
        super().__init__(a=[0.4, -0.7, 0.2])

    def forward(self):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


class Model(Params):
    """A decoder over a plate; ``mix`` says what joins its rows."""

    def __init__(self, mix):
        super().__init__(w=0.9)
        self.mix = mix
        self.norm = nn.BatchNorm1d(1, affine=False, dtype=F64)
        self.decoder = nn.Linear(1, 1, dtype=F64)

    def rows(self, z):
        if self.mix == "mean":
            return z.mean(-1, keepdim=True) + 0.5 * z
        if self.mix == "batch norm":
            flat = z.reshape(-1, 1) + torch.linspace(0.0, 0.1, z.numel(), dtype=F64).reshape(-1, 1)
            return self.norm(flat).reshape(z.shape)
        return z

    def forward(self):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * self.rows(z), 0.5), obs=X)


def mean_gradient(word, model, guide, **options):
    loss = SiteELBO(word, **options)(model, guide)
    loss.initialize()
    return mean_over_draws(lambda: gradient(loss(), nn.ModuleList([model, guide])))


ONE_BY_ONE = {"vectorize_particles": False}
ESTIMATORS = [
    *itertools.product(("score", "local-expectation", "measure-valued"), ({}, ONE_BY_ONE)),
    ("enumerate", {}),
    ("rloo", {"num_particles": 2, **ONE_BY_ONE}),
]


@pytest.mark.parametrize("mix", ["mean", "batch norm"])
@pytest.mark.parametrize(("word", "options"), ESTIMATORS)
def test_the_mean_over_every_draw_is_exact_where_rows_are_mixed(mix, word, options):
    torch.manual_seed(0)
    model, guide = Model(mix), Guide()
    if mix == "batch norm" and word == "enumerate":
        # A batch norm counts listed values as rows too, which the comparison with one particle sees.
        with pytest.raises(CannotVectorize, match="vectorize_particles=False"):
            mean_gradient(word, model, guide, vectorize_particles=True)
        return
    truth = exact_gradient(model, guide)
    assert torch.allclose(mean_gradient(word, model, guide, **options), truth, atol=1e-10)


@pytest.mark.parametrize(("mix", "word"), [("mean", "disarm"), ("batch norm", "disarm")])
def test_continuous_draws_average_to_the_exact_gradient_where_rows_are_mixed(mix, word):
    torch.manual_seed(1)
    model, guide = Model(mix), Guide()
    truth = exact_gradient(model, guide)
    loss = SiteELBO(word)(model, guide)
    loss.initialize()
    loss.binding.eval()
    assert loss.binding.mixed_plates == ("data",)
    draws = torch.stack([gradient(loss(), nn.ModuleList([model, guide])) for _ in range(200)])
    assert not misses(draws[:, -3:], truth[-3:], resolves=2.5)


def test_trust_keeps_the_rows_apart_and_is_biased():
    model, guide = Model("mean"), Guide()
    truth = exact_gradient(model, guide)
    assert not torch.allclose(mean_gradient("score", model, guide, plates="trust"), truth, atol=1e-3)
    assert torch.allclose(mean_gradient("score", model, guide, plates="ignore"), truth, atol=1e-10)


def test_rows_that_are_kept_apart_stay_apart():
    loss = SiteELBO("score")(Model(None), Guide())
    loss.initialize()
    assert loss.binding.mixed_plates == () and loss.binding.looks


class Product(Params):
    """Rows that only a product of coins joins: from most draws no single change shows it."""

    def __init__(self):
        super().__init__(w=0.9)

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * z * z.prod(-1, keepdim=True), 0.5), obs=X[:2])


class TwoCoins(Params):
    def __init__(self):
        super().__init__(a=[0.4, -0.7])

    def forward(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9, 10, 37, 128])
def test_among_any_two_rows_each_is_changed_without_the_other(size):
    groups = torch.stack(_groups(size)).double()
    apart = groups.T @ (1 - groups)  # how many groups hold the first and lack the second
    assert (apart + torch.eye(size) > 0).all()
    assert len(groups) <= min(size, 3 + 2 * math.ceil(math.log2(size)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [10, 37])
def test_one_row_that_reads_one_other_row_is_found(size, seed):
    """Neither the first nor the last one."""
    torch.manual_seed(seed)
    source = torch.arange(size)
    reader, read = (1 + torch.randperm(size - 2)[:2]).tolist()
    source[reader] = read

    def model():
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Bernoulli(torch.full((size,), 0.5, dtype=F64)))
            pyro.sample("x", dist.Normal(2 * z[..., source] + z, 1.0), obs=torch.zeros(size, dtype=F64))

    def guide():
        with pyro.plate("data", size):
            pyro.sample("z", dist.Bernoulli(torch.full((size,), 0.3, dtype=F64)))

    assert plates_mixed_by(model, guide, (), {}) == {"data"}
    source[reader] = reader
    assert plates_mixed_by(model, guide, (), {}) == frozenset()


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_are_mixed_at_some_values_only_are_looked_at_from_both_sides(seed):
    torch.manual_seed(seed)
    loss = SiteELBO("score")(Product(), TwoCoins())
    loss.initialize()
    assert loss.binding.mixed_plates == ("data",)


@pytest.mark.parametrize("seed", range(8))
def test_few_rows_that_are_mixed_at_few_values_are_looked_at_from_further_draws(seed):
    """A row reads whether both coins of the other row are up: a quarter of the draws hide it in both directions."""

    def guide():
        rows = pyro.plate("rows", 2, dim=-2)
        with rows, pyro.plate("coins", 2, dim=-1):
            return rows, pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))

    def model():
        rows, z = guide()
        with rows:
            pyro.sample("x", dist.Normal(z.prod(-1, keepdim=True).flip(-2), 1.0), obs=X[:2, None])

    torch.manual_seed(seed)
    assert "rows" in plates_mixed_by(model, guide, (), {})


class BeginsAtZero(Params):
    """A coupling of a plate's rows, or of the particles if there is no plate, that training turns on."""

    def __init__(self, rows):
        super().__init__(w=0.0)
        self.rows = rows

    def forward(self):
        if self.rows:
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
                pyro.sample("x", dist.Normal(2 * z + self.w * z.sum(-1, keepdim=True), 1.0), obs=X)
        else:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(2 * z + self.w * z.mean(), 1.0), obs=X[0])


class OneOrThree(Params):
    def __init__(self, rows):
        super().__init__(a=[0.4, -0.7, 0.2] if rows else 0.4)
        self.rows = rows

    def forward(self):
        with pyro.plate("data", 3) if self.rows else contextlib.nullcontext():
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@pytest.mark.parametrize("word", ["score", "rloo", "enumerate"])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.filterwarnings("ignore::gumbo.errors.GumboWarning")
def test_a_coupling_that_begins_at_zero_is_seen_before_training_turns_it_on(rows, word):
    """At zero no term shows it, and the programs are looked at once: later gradients lacked the cost of other rows."""
    model, guide = BeginsAtZero(rows), OneOrThree(rows)
    particles = SiteELBO(word, num_particles=2 if word == "rloo" or not rows else 1)
    loss = particles(model, guide).initialize()
    assert model.w.item() == 0.0
    with torch.no_grad():
        model.w.fill_(-1.5)
    mean = mean_over_draws(lambda: gradient(loss(), nn.ModuleList([model, guide])))
    assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


def test_a_trial_run_away_from_zero_leaves_parameters_and_graphs_as_they_were():
    model, guide = BeginsAtZero(True), OneOrThree(True)
    before = 3 * model.w**2 + model.w  # its graph has kept the value of w
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.rand(())
        torch.manual_seed(0)
        SiteELBO("score")(model, guide).initialize()
        assert torch.rand(()) == expected
    (before + SiteELBO("score")(model, guide)()).backward()
    assert model.w.item() == 0.0 and model.w.grad is not None


class Counts(Params):
    """A support that another draw gives: of the row itself, and of something global."""

    def __init__(self, observed):
        super().__init__(**({} if observed else {"a": 0.2}))
        self.observed = observed

    def forward(self):
        a = torch.zeros((), dtype=F64) if self.observed else self.a
        g = pyro.sample("g", dist.Categorical(logits=a * torch.arange(3, dtype=F64)))
        with pyro.plate("data", 3):
            n = pyro.sample("n", dist.Poisson((1.0 + a).expand(3)))
            k = pyro.sample("k", dist.Binomial(n + g, torch.full((3,), 0.5, dtype=F64)))
            if self.observed:
                pyro.sample("x", dist.Normal(k, 1.0), obs=X)


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_draw_may_move_the_support_of_another(seed):
    torch.manual_seed(seed)
    loss = SiteELBO("score")(Counts(True), Counts(False))
    assert loss().isfinite() and loss.binding.mixed_plates == ()


class Encoded(PyroModule):
    """A guide behind a batch norm that sees data only."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(dropout), nn.Linear(3, 2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


class Decoded(PyroModule):
    def __init__(self, norm):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


def buffers_of(*programs):
    return [b.clone() for program in programs for b in program.buffers()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_norm_that_sees_data_only_is_not_convicted(dropout):
    torch.manual_seed(2)
    model, guide, x = Decoded(False), Encoded(dropout), torch.randn(8, 2)
    before = buffers_of(model, guide)
    loss = SiteELBO("score")(model, guide)
    loss.initialize(x)
    assert loss.binding.mixed_plates == () and loss.binding.looks
    assert all(map(torch.equal, before, buffers_of(model, guide)))


def test_a_change_of_mode_or_batch_size_is_looked_at_and_leaves_no_trace():
    torch.manual_seed(3)
    model, guide, x = Decoded(True), Encoded(), torch.randn(8, 2)
    loss = SiteELBO("score")(model, guide)
    model.eval(), guide.eval()
    loss.initialize(x)
    assert loss.binding.mixed_plates == ()
    model.train(), guide.train()
    before, stream = buffers_of(model, guide), torch.get_rng_state()
    loss.initialize(x)
    assert loss.binding.mixed_plates == ("data",)
    assert all(map(torch.equal, before, buffers_of(model, guide)))
    assert torch.equal(stream, torch.get_rng_state())
    looks = len(loss.binding.looks)
    loss(x)
    assert len(loss.binding.looks) == looks
    loss(x[:5])
    assert len(loss.binding.looks) == looks + 1


def test_modules_of_plain_functions_are_met_and_kept():
    norm = nn.BatchNorm1d(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(norm(z), 1.0).to_event(1), obs=x)

    class Plain(Params):
        def __init__(self):
            super().__init__(a=[0.1, 0.2])

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.a.float()).expand([len(x), 2]).to_event(1))

    torch.manual_seed(4)
    x, before = torch.randn(6, 2), buffers_of(norm)
    norm.eval()
    loss = SiteELBO("score")(model, Plain())
    loss.initialize(x)
    assert loss.binding.mixed_plates == ()
    norm.train()
    loss.initialize(x)
    assert loss.binding.mixed_plates == ("data",)
    assert all(map(torch.equal, before, buffers_of(norm)))


@pytest.mark.parametrize(("objective", "word"), [("iwae", "rloo"), ("rws", None)])
def test_weights_for_each_row_are_refused_where_rows_are_mixed(objective, word):
    torch.manual_seed(5)
    model, guide, x = Decoded(True), Encoded(), torch.randn(8, 2)
    options = {"objective": objective, "num_particles": 2, "vectorize_particles": False}
    words = () if word is None else (word,)
    for _ in range(2):  # the refusal is not forgotten
        loss = SiteELBO(*words, **options)(model, guide)
        for _ in range(2):
            with pytest.raises(UnsupportedSite, match="plates='ignore'") as refused:
                loss(x)
            assert "\n" not in str(refused.value)
    SiteELBO(*words, plates="ignore", **options)(model, guide)(x)
    SiteELBO(*words, plates="trust", **options)(model, guide)(x)


def test_a_joint_list_that_is_too_long_is_refused():
    torch.manual_seed(6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)).expand([len(x)]))
            pyro.sample("x", dist.Normal(z.mean(-1, keepdim=True), 1.0), obs=x)

    class Plain(Params):
        def __init__(self):
            super().__init__(a=0.1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.a.float()).expand([len(x)]))

    with pytest.raises(UnsupportedSite, match="jointly over its plates takes 2\\^20 values"):
        SiteELBO("enumerate")(model, Plain())(torch.randn(20))


def test_only_the_plate_that_is_mixed_is_summed():
    """Outer rows keep their own costs, whose gradients are then exact and less noisy than a sum's."""

    class Nested(Params):
        def __init__(self):
            super().__init__(a=[[0.4, -0.7], [0.2, 0.1]])

        def forward(self):
            with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 2, dim=-1):
                pyro.sample("z", dist.Bernoulli(logits=self.a))

    class NestedModel(Params):
        def __init__(self):
            super().__init__(w=0.9)

        def forward(self):
            with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(torch.full((2, 2), 0.3, dtype=F64)))
                pyro.sample("x", dist.Normal(self.w * z.mean(-1, keepdim=True), 0.5), obs=X[:2])

    model, guide = NestedModel(), Nested()
    loss = SiteELBO("score")(model, guide)
    loss.initialize()
    assert loss.binding.mixed_plates == ("inner",)
    truth = exact_gradient(model, guide)
    for word in ("score", "local-expectation"):
        assert torch.allclose(mean_gradient(word, model, guide), truth, atol=1e-10)
    with pyro.get_param_store().scope():
        value = -exact_elbo(model, guide)
    assert torch.allclose(SiteELBO("enumerate")(model, guide)(), value, atol=1e-10)


def test_a_learnt_baseline_built_before_the_rows_were_found_mixed_is_refused():
    torch.manual_seed(7)
    model, guide, x = Decoded(True), Encoded(), torch.randn(8, 2)
    model.eval(), guide.eval()
    loss = SiteELBO("nvil")(model, guide)
    loss.initialize(x)
    model.train(), guide.train()
    with pytest.raises(BadInput, match="training mode"):
        loss(x)
    loss = SiteELBO("nvil")(model, guide)
    assert loss(x).isfinite()


def test_a_guide_that_mixes_rows_of_upstream_draws_is_found():
    class Layered(Params):
        def __init__(self):
            super().__init__(a=[0.4, -0.7], b=0.8)

        def forward(self):
            with pyro.plate("data", 2):
                y = pyro.sample("y", dist.Bernoulli(logits=self.a))
                pyro.sample("z", dist.Bernoulli(logits=self.b * y.flip(-1)))

    class Apart(Params):
        def __init__(self):
            super().__init__(w=0.9)

        def forward(self):
            with pyro.plate("data", 2):
                y = pyro.sample("y", dist.Bernoulli(torch.full((2,), 0.3, dtype=F64)))
                z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.6, dtype=F64)))
                pyro.sample("x", dist.Normal(self.w * y + z, 0.5), obs=X[:2])

    model, guide = Apart(), Layered()
    truth = exact_gradient(model, guide)
    for word in ("score", {"y": "local-expectation", "z": "enumerate"}):
        assert torch.allclose(mean_gradient(word, model, guide), truth, atol=1e-10)


def test_an_audit_says_which_plates_are_mixed():
    model, guide = Model("mean"), Guide()
    report = audit(model, guide, estimators=["score", "trace-graph"], num_samples=200, burn_in=0, seed=1)
    assert report.attrs["mixed_plates"] == "data"
    assert report.verdict.sel(estimator="score").item() == "ok"
    assert report.verdict.sel(estimator="trace-graph").item().startswith("flagged")
    apart = audit(Model(None), guide, estimators=["score"], num_samples=10, burn_in=0, seed=1)
    assert apart.attrs["mixed_plates"] == ""


class Choosing(Params):
    """The first row's draw decides which observation all rows have, or how many."""

    def __init__(self, what):
        super().__init__(w=0.9)
        self.what = what

    def forward(self):
        rows = pyro.plate("data", 3, dim=-1)
        with rows:
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.3, dtype=F64)))
        first = bool(z.reshape(-1)[0] > 0)
        if self.what == "which observation":
            with rows:
                if first:
                    pyro.sample("x1", dist.Normal(self.w * z, 1.0), obs=X)
                else:
                    pyro.sample("x2", dist.Normal(-2 * self.w * z, 2.0), obs=X)
        elif self.what == "whether a row is seen":
            # Only rows with a draw of 1 have a term, so that the statement may as well be left out without any.
            if z.any():
                with rows, pyro.poutine.mask(mask=z > 0):
                    pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X)
        elif self.what == "the name":
            with rows:
                pyro.sample(f"x{int(first)}", dist.Normal(self.w * z, 1.0), obs=X)
        else:
            n = 2 if first else 4
            with pyro.plate("copies", n, dim=-2), rows:
                pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X.expand(n, 3))


CHOICES = ["which observation", "how many observations"]


@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize("seed", range(3))
def test_a_row_that_decides_which_terms_other_rows_have_is_mixed_with_them(what, seed):
    torch.manual_seed(seed)
    model, guide = Choosing(what), Guide()
    truth = exact_gradient(model, guide)
    assert torch.allclose(mean_gradient("score", model, guide, **ONE_BY_ONE), truth, atol=1e-10)
    with pytest.raises(UnsupportedSite, match="plates='ignore'"):
        SiteELBO("rloo", objective="iwae", num_particles=2, **ONE_BY_ONE)(model, guide).initialize()


def test_a_local_expectation_is_exact_where_a_row_decides_which_terms_others_have():
    model, guide = Choosing(CHOICES[0]), Guide()
    truth = exact_gradient(model, guide)
    assert torch.allclose(mean_gradient("local-expectation", model, guide, **ONE_BY_ONE), truth, atol=1e-10)


@pytest.mark.parametrize("what", ["whether a row is seen", "the name"])
@pytest.mark.parametrize("seed", range(4))
def test_a_statement_that_comes_and_goes_leaves_the_rows_apart_if_their_terms_stay(what, seed):
    torch.manual_seed(seed)
    model, guide = Choosing(what), Guide()
    loss = SiteELBO("score", **ONE_BY_ONE)(model, guide)
    loss.initialize()
    assert loss.binding.mixed_plates == () and loss.binding.looks
    assert torch.allclose(mean_gradient("score", model, guide, **ONE_BY_ONE), exact_gradient(model, guide), atol=1e-10)


class Branching(Params):
    """Each row's draw decides whether the row has a second latent, under a mask."""

    def __init__(self, ours):
        super().__init__(**({"a": [0.4, -0.7], "b": [0.3, 0.8]} if ours else {}))
        self.ours = ours

    def forward(self):
        rows = pyro.plate("data", 2)
        with rows:
            z = pyro.sample("z", dist.Bernoulli(logits=self.a if self.ours else torch.zeros(2, dtype=F64)))
        if z.any():
            with rows, pyro.poutine.mask(mask=z > 0):
                pyro.sample("y", dist.Normal(self.b if self.ours else torch.zeros(2, dtype=F64), 1.0))


def test_latents_that_exist_at_some_draws_leave_the_rows_apart():
    for seed in range(40):
        torch.manual_seed(seed)
        loss = SiteELBO("score", **ONE_BY_ONE)(Branching(False), Branching(True))
        loss.initialize()
        assert loss.binding.mixed_plates == (), seed


# --- switches that change what the programs do


class Switched(Model):
    """A keyword, or an attribute of a layer, says whether the rows are mixed."""

    def __init__(self):
        super().__init__(None)
        self.layer = nn.Identity()
        self.layer.pools = False

    def forward(self, pool=False, *more):
        self.mix = "mean" if pool or self.layer.pools else None
        return super().forward()


class Unswitched(Guide):
    def forward(self, *args, **kwargs):
        return super().forward()


@pytest.mark.parametrize("how", ["argument", "keyword", "attribute"])
def test_a_switch_that_mixes_rows_later_is_seen(how):
    torch.manual_seed(0)
    model, guide = Switched(), Unswitched()
    loss = SiteELBO("enumerate")(model, guide)
    assert loss(False).isfinite() and loss.binding.mixed_plates == ()
    truth = exact_gradient(*(pair := (Model("mean"), Guide())))
    assert torch.allclose(gradient(SiteELBO("enumerate")(*pair)(), nn.ModuleList(pair)), truth)
    model.layer.pools = how == "attribute"
    called = {"argument": lambda: loss(True), "keyword": lambda: loss(pool=True), "attribute": lambda: loss(False)}
    assert torch.allclose(gradient(called[how](), nn.ModuleList([model, guide])), truth, atol=1e-10)
    assert loss.binding.mixed_plates == ("data",)


def test_numbers_and_texts_that_change_at_every_call_are_looked_at_a_few_times():
    loss = SiteELBO("score")(Switched(), Unswitched())
    for step in range(50):
        loss(False, step, str(step))
    assert len({mode for mode, _ in loss.binding.looks}) <= 64 and loss.binding.mixed_plates == ()

"""One step of training: what it checks, what it does not pay for, what it leaves alone."""

from __future__ import annotations

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam

from gumbo.errors import BadInput
from gumbo.guides import NormalGuide
from gumbo.inference import SiteELBO, fit
from gumbo.inference.engine.rows import Rows
from gumbo.inference.engine.scopes import denormals_flushed
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import GaussianVAE

SHAPE = (1, 3, 3)
TINY = torch.finfo(torch.float32).tiny


def images(rows: int = 12) -> torch.Tensor:
    return torch.bernoulli(torch.full((rows, *SHAPE), 0.4), generator=torch.Generator().manual_seed(0))


def pair():
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(6,))
    return model, NormalGuide(model, hidden=(6,))


class Watching(PyroModule):
    """A model that notes whether Pyro validates while it runs."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[bool, ...]] = []

    def forward(self, x):
        settings = (pyro.settings.get(f"validate_{part}") for part in ("distributions_pyro", "infer", "poutine"))
        self.seen.append(tuple(settings))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


class WatchingGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean, 1.0))


@pytest.mark.parametrize("loss", ["pathwise", "trace", "trace-graph"])
@pytest.mark.parametrize("validate", [False, True])
def test_validation_is_on_in_the_first_run_and_then_only_where_asked(loss, validate):
    model = Watching()
    fit(model, WatchingGuide(), torch.ones(6), loss=loss, epochs=2, batch_size=3, validate=validate, progress=False)
    assert all(model.seen[0])
    assert {flag for seen in model.seen[-4:] for flag in seen} == {validate}


@pytest.mark.parametrize("loss", ["pathwise", "trace", "trace-graph"])
@pytest.mark.parametrize("value", [2.0, -1.0])
def test_data_outside_the_support_are_found_in_any_batch(loss, value):
    x = torch.ones(12)
    x[7] = value
    with pytest.raises(BadInput, match="site 'x'.*outside the support of Bernoulli"):
        fit(Watching(), WatchingGuide(), x, loss=loss, epochs=1, batch_size=2, progress=False)


def test_data_that_a_transform_spoils_are_found_in_a_later_epoch():
    batches = []

    def spoil(x, generator):
        batches.append(x)
        return x + 1.0 if len(batches) > 8 else x

    with pytest.raises(BadInput, match="site 'x'.*outside the support"):
        fit(Watching(), WatchingGuide(), torch.ones(6), epochs=9, batch_size=3, transform=spoil, progress=False)
    assert len(batches) == 9


def test_what_is_skipped_changes_no_number():
    straight, validated = pair(), pair()
    validated[0].load_state_dict(straight[0].state_dict())
    validated[1].load_state_dict(straight[1].state_dict())
    one = fit(*straight, images(), epochs=3, batch_size=5, progress=False)
    other = fit(*validated, images(), epochs=3, batch_size=5, validate=True, progress=False)
    assert [numbers["elbo"] for numbers in one.history] == [numbers["elbo"] for numbers in other.history]
    for mine, theirs in zip(straight[0].parameters(), validated[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("word", ["adam", "adamw", "sgd", "adamax", "nadam", "radam", "rmsprop"])
def test_a_fused_optimizer_takes_the_step_of_a_plain_one(word):
    torch.manual_seed(0)
    start, slopes = torch.randn(50, dtype=torch.float64), torch.randn(5, 50, dtype=torch.float64)
    plain = lambda named: getattr(torch.optim, NAMES[word])([*named.values()], lr=0.1, foreach=False)  # noqa: E731
    found = []
    for make in (make_optimizer(word, 0.1)[0], plain):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make({"weight": parameter})
        for slope in slopes:
            parameter.grad = slope.clone()
            optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def strided(value: torch.Tensor, memory: str) -> torch.Tensor:
    """The same values in another order in memory, or with gaps between them."""
    if memory == "gaps":
        return torch.stack([value, value], -1)[..., 0]
    return value.t().contiguous().t() if memory == "columns" else value


@pytest.mark.parametrize("memory", ["columns", "gaps"])
@pytest.mark.parametrize("word", ["adam", "adamw", "sgd", "rmsprop"])
def test_the_order_of_elements_in_memory_changes_no_step(word, memory):
    torch.manual_seed(0)
    start, slopes = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 4, 3, dtype=torch.float64)
    found = []
    for kind in ("rows", memory):
        parameter = torch.nn.Parameter(strided(start.clone(), kind))
        updates = make_optimizer(word, 0.1)[0]({"weight": parameter})
        for slope in slopes:
            parameter.grad = slope.clone()
            updates.step()
        found.append(parameter.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["between steps", "between runs"])
def test_moments_follow_a_parameter_to_another_order_in_memory(how):
    torch.manual_seed(0)
    start, slopes = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 4, 3, dtype=torch.float64)
    found = []
    for moves in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        updates = make_optimizer("adam", 0.1)[0]({"weight": parameter})
        for number, slope in enumerate(slopes):
            if moves and number == 2:
                parameter.data = strided(parameter.data, "columns")
                if how == "between runs":
                    before, updates = updates, make_optimizer("adam", 0.1)[0]({"weight": parameter})
                    updates.load_state_dict(copy.deepcopy(before.state_dict()))
                    assert updates.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
            parameter.grad = slope.clone()
            updates.step()
        found.append(parameter.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_fused_optimizer_of_the_callers_refuses_gaps_in_memory():
    parameter = torch.nn.Parameter(strided(torch.zeros(4, 3), "gaps"))
    updates = make_optimizer(partial(torch.optim.Adam, fused=True), 0.1)[0]({"weight": parameter})
    parameter.grad = torch.ones(4, 3)
    with pytest.raises(BadInput, match=r"shape \(4, 3\) has the strides \(6, 2\), with gaps.*contiguous"):
        updates.step()


@pytest.mark.parametrize("word", ["adam", "adamw", "sgd"])
def test_complex_parameters_take_the_step_of_torchs_own_class(word):
    torch.manual_seed(0)
    start, slopes = torch.randn(5, dtype=torch.complex128), torch.randn(3, 5, dtype=torch.complex128)
    found = []
    for make in (make_optimizer(word, 0.1)[0], make_optimizer(getattr(torch.optim, NAMES[word]), 0.1)[0]):
        parameter = torch.nn.Parameter(start.clone())
        updates = make({"weight": parameter})
        for slope in slopes:
            parameter.grad = slope.clone()
            updates.step()
        found.append(parameter.detach())
    assert torch.equal(*found)


NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "adamax": "Adamax",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
}


@pytest.mark.parametrize("word", ["adam", "adamw", "sgd"])
def test_one_kernel_serves_all_parameters(word):
    updates = make_optimizer(word, 0.1)[0]({"weight": torch.nn.Parameter(torch.zeros(2))})
    assert updates.optimizer.defaults["fused"]


@pytest.mark.parametrize("before", [False, True])
def test_denormals_are_flushed_inside_and_as_before_outside(before):
    def flushed() -> bool:
        return (torch.tensor([TINY]) / 2).item() == 0.0

    torch.set_flush_denormal(before)
    try:
        with denormals_flushed():
            assert flushed()
        assert flushed() == before
    finally:
        torch.set_flush_denormal(False)


def test_fit_flushes_denormals_and_restores_them():
    seen = []
    watch = lambda numbers: seen.append((torch.tensor([TINY]) / 2).item())  # noqa: E731
    fit(*pair(), images(), epochs=1, progress=False, on_epoch=watch)
    assert seen == [0.0]
    assert (torch.tensor([TINY]) / 2).item() > 0.0


class Scaled(PyroModule):
    """Guide with a PyroParam, which takes its value from the store where the store has one."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))
        self.sd = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean, self.sd))


@pytest.mark.parametrize("guide", [WatchingGuide, Scaled])
def test_a_parameter_replaced_between_calls_is_the_one_that_counts(guide):
    x, guide = torch.ones(4), guide()
    loss = SiteELBO("pathwise")(Watching(), guide)
    for _ in range(3):
        loss(x)
    guide.mean = torch.nn.Parameter(torch.tensor(3.0))
    if isinstance(guide, Scaled):
        guide.sd_unconstrained = torch.nn.Parameter(torch.tensor(-2.0))
    loss(x).backward()
    assert guide.mean.item() == 3.0 and guide.mean.grad is not None
    if isinstance(guide, Scaled):
        assert guide.sd_unconstrained.item() == -2.0 and guide.sd_unconstrained.grad is not None


def test_a_global_parameter_is_refused_also_when_it_shows_late():
    class Late(Watching):
        late = False

        def forward(self, x):
            if self.late:
                pyro.param("stray", torch.zeros(()))
            super().forward(x)

    model = Late()
    loss = SiteELBO("pathwise")(model, WatchingGuide())
    for _ in range(3):
        loss(torch.ones(4))
    model.late = True
    with pytest.raises(BadInput, match="'stray' is not a parameter of model or guide"):
        loss(torch.ones(4))


def test_a_step_leaves_the_store_and_the_validation_flags(param_store):
    before = pyro.settings.get()
    model, guide = pair()
    step = TorchStep(model, guide, SiteELBO("pathwise"), make_optimizer("adam", 1e-3)[0], Rows(images()))
    step(Rows(images()))
    assert pyro.settings.get() == before and not len(param_store)


def test_a_network_replaced_between_calls_is_the_one_that_counts():
    torch.manual_seed(0)
    (model, guide), x = pair(), images()
    loss = SiteELBO("pathwise")(model, guide)
    for _ in range(3):
        loss(x)
    model.decoder = torch.nn.Linear(2, 9)
    loss(x).backward()
    assert model.decoder.weight.grad is not None
    assert "decoder" not in vars(model) and "encoder" not in vars(guide)


def test_networks_are_put_back_when_a_call_fails():
    torch.manual_seed(0)
    (model, guide), x = pair(), images()
    loss = SiteELBO("pathwise")(model, guide)
    for _ in range(3):
        loss(x)
    with pytest.raises(BadInput):
        loss(x[:, :, :2])
    assert "decoder" not in vars(model) and "encoder" not in vars(guide)

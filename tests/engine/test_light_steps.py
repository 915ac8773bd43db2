"""What a step leaves out: bodies that would give the same statements, checks of data that did not change."""

from __future__ import annotations

import pickle
from collections import defaultdict

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gumbo.errors import BadInput
from gumbo.guides import BernoulliGuide, guides
from gumbo.inference import SiteELBO
from gumbo.inference.engine.rows import Rows
from gumbo.inference.engine.scopes import Store
from gumbo.inference.estimators._base import detached_draw
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import BernoulliVAE, models

RERUNNING = ("disarm", "arm", "muprop", "local-expectation", "rebar")


class Rerun(BernoulliGuide):
    """The same guide, whose body runs again for other draws."""

    factorized = False


def pair(guide=BernoulliGuide):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BernoulliVAE((1, 8, 8), num_latents=5, hidden=(6,))
        return model, guide(model)


def images(rows=3):
    return (torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.4).float()


def gradients(word, guide):
    loss = SiteELBO(word)(*pair(guide)).initialize(images())
    found = []
    for _ in range(2):
        torch.manual_seed(2)
        value = loss(images())
        found += [value, *torch.autograd.grad(value, list(loss.parameters()), allow_unused=True), torch.rand(1)]
    return found


@pytest.mark.parametrize("word", RERUNNING)
def test_repeated_statements_give_the_bits_of_a_repeated_body(word, param_store):
    for ours, theirs in zip(gradients(word, BernoulliGuide), gradients(word, Rerun), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def calls_of_the_encoder(guide, prepare=lambda guide: None):
    model, guide = pair(guide)
    loss = SiteELBO("disarm")(model, guide).initialize(images())
    calls = []
    guide.encoder.register_forward_hook(lambda *_: calls.append(1))
    prepare(guide)
    loss(images())
    return len(calls)


class Dropping(BernoulliGuide):
    """Draws noise of its own, which another run has to draw again."""

    def features(self, x, conditions):
        return nn.functional.dropout(super().features(x, conditions), 0.5, True)


def test_the_networks_of_a_factorized_guide_run_once(param_store):
    assert calls_of_the_encoder(BernoulliGuide) == 1
    assert calls_of_the_encoder(Rerun) == 2


def test_a_guide_with_noise_or_hooks_of_its_own_runs_again(param_store):
    assert calls_of_the_encoder(Dropping) == 2
    assert calls_of_the_encoder(BernoulliGuide, lambda guide: guide.register_forward_hook(lambda *_: None)) == 2


def test_a_subclass_with_its_own_forward_declares_again_that_it_is_factorized():
    class Own(BernoulliGuide):
        def forward(self, x):
            return super().forward(x)

    class Again(Own):
        factorized = True

        def forward(self, x):
            return super().forward(x)

    assert BernoulliGuide.factorized and not Own.factorized and Again.factorized


def test_sites_of_factorized_guides_do_not_depend_on_draws(param_store):
    found = 0
    for Model in models.values():
        for variant in Model.variants:
            for Guide in guides.values():
                if not getattr(Guide, "factorized", False):
                    continue
                torch.manual_seed(0)
                model = Model((1, 8, 8), **variant)
                if Guide.why_not(model):
                    continue
                guide, batch = Guide(model), model.example(2)
                traces = []
                for seed in (1, 2):
                    torch.manual_seed(seed)
                    traces.append(pyro.poutine.trace(guide).get_trace(**batch))
                values = [{n: t.nodes[n]["value"].detach() for n in model.latents} for t in traces]
                for name in model.latents:
                    scores = [t.nodes[name]["fn"].log_prob(values[0][name]) for t in traces]
                    assert torch.equal(*scores), (Guide, name)
                found += 1
    assert found > 10


def test_data_are_checked_again_when_they_change(param_store):
    x = images()
    step = TorchStep(*pair(), SiteELBO("disarm"), make_optimizer("adam", 1e-3)[0], Rows(x))
    step(Rows(x))
    step(Rows(x))
    x[0, 0, 0, 0] = 0.5  # in place: the same tensor
    with pytest.raises(BadInput, match="outside the support"):
        step(Rows(x))
    with pytest.raises(BadInput, match="outside the support"):
        step(Rows(x.clone()))
    x[0, 0, 0, 0] = 1.0
    step(Rows(x))


class Bounded(pyro.nn.PyroModule):
    """Its data have a support whose bound is a tensor."""

    def __init__(self):
        super().__init__()
        self.top, self.w = torch.tensor(2.0), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.w, 1.0))
            pyro.sample("x", dist.Uniform(torch.tensor(0.0), self.top), obs=x)


class Drawn(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.v, 1.0))


def test_data_are_checked_again_when_the_support_moves(param_store):
    model, x = Bounded(), torch.ones(3)
    step = TorchStep(model, Drawn(), SiteELBO(), make_optimizer("adam", 1e-3)[0], Rows(x))
    step(Rows(x))
    model.top.fill_(0.5)
    with pytest.raises(BadInput, match="outside the support"):
        step(Rows(x))


def test_a_store_of_its_own_leaves_the_outer_one_as_it_was(param_store):
    outer = pyro.param("a", torch.ones(()))
    store = Store()
    for _ in range(2):
        with store:
            assert pyro.param("a", torch.zeros(())).item() == 0.0
            with Store():
                assert "a" not in pyro.get_param_store()
        assert pyro.param("a") is outer and len(pyro.get_param_store()) == 1
    with pytest.raises(ValueError, match="stop"), store:
        pyro.clear_param_store()
        raise ValueError("stop")
    assert pyro.param("a") is outer and not store.params


def test_programs_can_be_pickled_after_a_step(param_store):
    model, guide = pair()
    step = TorchStep(model, guide, SiteELBO("disarm"), make_optimizer("adam", 1e-3)[0], Rows(images()))
    step(Rows(images()))
    copy = pickle.loads(pickle.dumps((model, guide)))
    assert all(map(torch.equal, copy[0].parameters(), model.parameters()))


class Failing(Drawn):
    fails = False

    def forward(self, x):
        if self.fails:
            pyro.param("stray", torch.zeros(()))
            raise RuntimeError("broken")
        super().forward(x)


def test_a_failed_call_leaves_nothing_in_the_store(param_store):
    guide, x = Failing(), torch.ones(3)
    loss = SiteELBO()(Bounded(), guide)
    first = loss(x), loss(x)
    guide.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        loss(x)
    guide.fails = False
    assert len(first) == 2 and loss(x).isfinite()


class Passes(TorchDispatchMode):
    """The numbers of elements that each operation reads."""

    def __init__(self):
        super().__init__()
        self.sizes = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.sizes[func.overloadpacket.__name__].append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("word", ["rloo", "disarm", "score"])
def test_coins_of_an_event_are_summed_before_the_sign_changes(word, param_store):
    model, guide = pair()
    loss = SiteELBO(word, num_particles=2)(model, guide).initialize(images())
    with pyro.validation_enabled(False), Passes() as passes:
        loss(images()).backward()
    pixels = images().numel()
    assert max(passes.sizes["binary_cross_entropy_with_logits"]) >= pixels
    assert max(passes.sizes["neg"]) < pixels


@pytest.mark.parametrize("make", [dist.OneHotCategorical, dist.Categorical, dist.Bernoulli])
def test_particles_share_the_probabilities_of_their_logits(make):
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    made = {}
    for name in ("ours", "theirs"):
        fn = make(logits=logits, validate_args=False)
        fn = fn.expand((5, *fn.batch_shape))
        torch.manual_seed(2)
        made[name] = fn, detached_draw(fn).value if name == "ours" else fn.sample()
    (ours, drawn), (theirs, expected) = made["ours"], made["theirs"]
    assert ours.probs.stride()[0] == 0 and theirs.probs.stride()[0] > 0
    assert torch.equal(drawn, expected)
    weight = torch.arange(ours.probs.numel(), dtype=torch.float64).reshape(ours.probs.shape)
    slopes = [torch.autograd.grad((fn.probs * weight).sum(), logits, retain_graph=True)[0] for fn in (ours, theirs)]
    torch.testing.assert_close(*slopes)

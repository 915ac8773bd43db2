"""Every registered model, and every guide that fits it, keeps its contract; the contract itself sees what breaks it."""

from __future__ import annotations

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo import inference
from gumbo.experiments.data import load
from gumbo.guides import NormalGuide, fitting, guides
from gumbo.inference import SiteELBO
from gumbo.models import GenerativeModel, Latent, models
from gumbo.models.families import families
from gumbo.testing import check_guide, check_model

SHAPE = (1, 8, 8)


def batch(model, rows=4):
    """A batch that the model itself drew: ``(x, what else the programs take)``."""
    found = model.example(rows)
    return found.pop("x"), found


def variants():
    return [pytest.param(name, i, id=f"{name}-{i}") for name, cls in models.items() for i in range(len(cls.variants))]


def build(name, variant):
    cls = models[name]
    return cls(**{"data_shape": SHAPE, **cls.variants[variant]})


def pairs():
    return [
        pytest.param(*variant.values, guide, id=f"{variant.id}-{guide}")
        for variant in variants()
        for guide in fitting(build(*variant.values))
    ]


@pytest.mark.parametrize("name, variant", variants())
def test_model_contract(name, variant):
    model = build(name, variant)
    x, beside = batch(model)
    check_model(model, x, **beside)


@pytest.mark.parametrize("name, variant, guide", pairs())
def test_guide_contract(name, variant, guide):
    model = build(name, variant)
    x, beside = batch(model)
    check_guide(guides[guide](model), model, x, **beside)


# How each family's draws are differentiated below.
SMOOTH = ("normal", "relaxed-categorical", "log-normal", "gamma", "beta", "dirichlet")
ESTIMATORS = {family: "pathwise" if family in SMOOTH else "rloo" for family in families}


CHECKED = [*guides.values(), *(vars(inference)[name] for name in ("Auto", "Constant", "Exponential", "Linear"))]


@pytest.mark.parametrize("cls", [*models.values(), *CHECKED], ids=lambda cls: cls.__name__)
def test_a_class_has_the_signature_of_its_constructor(cls):
    """Said by the class itself: Python 3.10 and Sphinx would read that of ``__new__``, which takes every option."""
    said = inspect.signature(cls, follow_wrapped=False)
    assert cls.__signature__ == said
    assert list(said.parameters) == list(inspect.signature(cls.__init__).parameters)[1:]


def test_a_callable_object_keeps_the_signature_of_its_call():
    assert list(inspect.signature(inference.Linear(3)).parameters) == ["step"]


@pytest.mark.parametrize("name, variant", variants())
def test_the_loss_falls_on_digits(name, variant):
    data = load("digits", binarize="static")
    extra = {"condition_shape": (10,)} if name == "conditional-vae" else {}
    extra |= {"num_batches": 10} if "num_batches" in models[name].variants[variant] else {}
    model = models[name](**{"data_shape": SHAPE, **models[name].variants[variant], **extra})
    guide = guides[[guide for guide in fitting(model) if guide != "unconditional"][-1]](model)
    words = {site: ESTIMATORS[latent.family] for site, latent in model.latents.items() if latent.local}
    weight = 0.0 if name == "grid-world" else 1.0  # a walk of two steps gains less than its policy's entropy
    loss = SiteELBO(words, num_particles=2, kl_weight=weight)(model, guide)
    labelled = model.x_is_given or name in ("conditional-vae", "neural-bayes-net", "negative-binomial-vae")
    parameters = dict.fromkeys([*model.parameters(), *guide.parameters()])  # an encoder may be shared
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    # Where a row is a walk through many steps, half as many passes do.
    for step in range(30 if name in ("sequence-vae", "deep-markov-model", "switching-state-space") else 60):
        rows = slice(20 * step, 20 * step + 20)
        batch = model.inputs(data.train[rows], data.labels["train"][rows] if labelled else None)
        optimizer.zero_grad()
        value = loss(**batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), (guide, losses[::10])


# --- the contract sees faults ---------------------------------------------------------------------------------------


BATCH = (torch.arange(4 * 64).reshape(4, *SHAPE) % 3 % 2).float()


class Sound(GenerativeModel):
    """A small model written from outside the package; each fault below changes one thing about it."""

    def __init__(self):
        super().__init__(SHAPE)
        self.latents = {"z": Latent("normal", (2,))}
        self.decoder = torch.nn.Linear(2, 64)
        self.register_buffer("zero", torch.zeros(2))

    def prior(self):
        return dist.Normal(self.zero, 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Bernoulli(logits=self.decoder(z).unflatten(-1, SHAPE)).to_event(3)

    def forward(self, x=None, *, batch_size=1):
        with self.data_plate(x, batch_size):
            return pyro.sample("x", self.likelihood(pyro.sample("z", self.prior())), obs=x)


class WrongShape(Sound):
    def __init__(self):
        super().__init__()
        self.latents = {"z": Latent("normal", (3,))}


class WrongSupport(Sound):
    def __init__(self):
        super().__init__()
        self.latents = {"z": Latent("bernoulli", (2,))}


class NoPlate(Sound):
    def forward(self, x=None, *, batch_size=1):
        rows = len(x) if x is not None else batch_size
        z = pyro.sample("z", self.prior().expand([rows]))
        return pyro.sample("x", self.likelihood(z), obs=x)


class OtherDevice(Sound):
    def prior(self):
        return dist.Normal(self.zero + torch.zeros(2), 1.0).to_event(1)


class OtherDtype(Sound):
    def prior(self):
        return dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1)


class MixesRows(Sound):
    def likelihood(self, z):
        return super().likelihood(z - z.mean(-2, keepdim=True))


class MixesParticles(Sound):
    def likelihood(self, z):
        return super().likelihood(z - z.mean(0, keepdim=True) if z.dim() > 2 else z)


class Unused(Sound):
    def __init__(self):
        super().__init__()
        self.decoder_unused = torch.nn.Linear(1, 1)


class Misnamed(Sound):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(1, 1)


class NotSaved(Sound):
    def __init__(self):
        super().__init__()
        self.offset = torch.randn(2)

    def likelihood(self, z):
        return super().likelihood(z + self.offset)


class TakesAnything(Sound):
    def check_batch(self, x, like):
        pass


MODEL_FAULTS = {
    WrongShape: r"site 'z' has shape \(1, 2\), expected \(1, 3\)",
    WrongSupport: "leaves the support of bernoulli",
    NoPlate: "must be in the plate 'data'",
    OtherDevice: "fails on another device",
    OtherDtype: "fails in float64",
    MixesRows: "depends on the other rows",
    MixesParticles: "means something else for 3 particles",
    Unused: "no gradient reaches parameter 'decoder_unused.weight'",
    Misnamed: "'network.weight' must be called decoder",
    NotSaved: "gives other numbers once saved",
    TakesAnything: "takes a batch with another shape without a word",
}


def test_a_model_from_outside_passes():
    check_model(Sound(), BATCH)
    check_guide(NormalGuide(Sound()), Sound(), BATCH)


@pytest.mark.parametrize("fault", MODEL_FAULTS, ids=lambda fault: fault.__name__)
def test_model_faults_are_seen(fault):
    with pytest.raises(AssertionError, match=f"^{fault.__name__}: .*{MODEL_FAULTS[fault]}"):
        check_model(fault(), BATCH)


class NotReturned(NormalGuide):
    def forward(self, x):
        super().forward(x)


class Forgets(NormalGuide):
    def forward(self, x):
        with pyro.poutine.block(hide=["z"]):
            return super().forward(x)


class Collides(NormalGuide):
    def __init__(self, model):
        super().__init__(model)
        self.decoder = torch.nn.Linear(2, 64)


class BatchNormalized(NormalGuide):
    def __init__(self, model):
        super().__init__(model)
        self.encoder.dense.append(torch.nn.BatchNorm1d(128))


class Narrow(NormalGuide):
    """Detaches what one of its heads says, so that nothing trains it."""

    def distribution(self, latent, output):
        return super().distribution(latent, output.detach())


class Other(NormalGuide):
    """Draws an auxiliary site of its own."""

    def distribution(self, latent, output):
        pyro.sample("extra", dist.Normal(output.new_zeros(()), 1.0), infer={"is_auxiliary": True})
        return super().distribution(latent, output)


GUIDE_FAULTS = {
    NotReturned: "must return its draws as a dict",
    Forgets: "never samples the declared latent 'z'",
    Collides: "'decoder.weight' must be called encoder",
    BatchNormalized: "fails with 1 rows",
    Narrow: "no gradient reaches parameter 'encoder",
    Other: "samples 'extra', which the model does not declare",
}


@pytest.mark.parametrize("fault", GUIDE_FAULTS, ids=lambda fault: fault.__name__)
def test_guide_faults_are_seen(fault):
    with pytest.raises(AssertionError, match=f"^{fault.__name__}: .*{GUIDE_FAULTS[fault]}"):
        check_guide(fault(Sound()), Sound(), BATCH)


def test_the_checks_leave_no_trace():
    model = Sound()
    guide, x = NormalGuide(model), BATCH
    weights, random = model.decoder.weight.clone(), torch.get_rng_state()
    check_model(model, x)
    check_guide(guide, model, x)
    assert torch.equal(model.decoder.weight, weights) and model.decoder.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert len(pyro.get_param_store()) == 0

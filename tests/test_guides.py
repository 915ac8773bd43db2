"""What the contract does not say of single guides: their numbers, several sites, which models they fit."""

from __future__ import annotations

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.nn.functional import softplus

from gumbo.errors import BadInput, UnknownName
from gumbo.guides import (
    BernoulliGuide,
    CategoricalGuide,
    NormalGuide,
    RelaxedCategoricalGuide,
    fitting,
    guides,
)
from gumbo.models import BernoulliVAE, CategoricalVAE, GaussianVAE, GenerativeModel, Latent, models
from gumbo.testing import check_guide, check_model

SHAPE = (1, 4, 4)


def images(rows=5):
    return torch.randint(2, (rows, *SHAPE)).float()


def site(guide, x, name):
    """The distribution of a guide's site, without its ``to_event``."""
    with pyro.get_param_store().scope():
        return poutine.trace(guide).get_trace(x).nodes[name]["fn"].base_dist


class TwoLatents(GenerativeModel):
    """Two Normal latents of different shapes, one of them a matrix."""

    def __init__(self):
        super().__init__(SHAPE)
        self.latents = {"a": Latent("normal", (2, 3)), "b": Latent("normal", (4,))}
        self.decoder = torch.nn.Linear(10, 16)
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, x=None, *, batch_size=1):
        with self.data_plate(x, batch_size):
            a = pyro.sample("a", dist.Normal(self.zero, 1.0).expand([2, 3]).to_event(2))
            b = pyro.sample("b", dist.Normal(self.zero, 1.0).expand([4]).to_event(1))
            logits = self.decoder(torch.cat([a.flatten(-2), b], -1)).unflatten(-1, SHAPE)
            return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)


def test_a_head_for_each_site():
    model = TwoLatents()
    guide = NormalGuide(model, hidden=(8,))
    assert {name: head.out_features for name, head in guide.encoder_heads.items()} == {"a": 12, "b": 8}
    check_model(model, images())
    check_guide(guide, model, images())


def test_normal_guide_by_hand():
    model, x = GaussianVAE(SHAPE, latent_dim=3, hidden=(6,)), images()
    guide = NormalGuide(model, hidden=(6,), min_sd=0.01)
    loc, raw = guide.encoder_heads["z"](guide.encoder(x)).chunk(2, -1)
    found = site(guide, x, "z")
    torch.testing.assert_close(found.loc, loc)
    torch.testing.assert_close(found.scale, softplus(raw) + 0.01)
    guide.encoder_heads["z"].bias.data[3:] = -1e4
    assert site(guide, x, "z").scale.min().item() == pytest.approx(0.01)


def test_discrete_guides_by_hand():
    x = images()
    guide = CategoricalGuide(CategoricalVAE(SHAPE, num_latents=3, num_classes=4, hidden=(6,)), hidden=(6,))
    logits = guide.encoder_heads["y"](guide.encoder(x)).reshape(5, 3, 4)
    torch.testing.assert_close(site(guide, x, "y").probs, logits.softmax(-1))
    guide = BernoulliGuide(BernoulliVAE(SHAPE, num_latents=3, hidden=(6,)), hidden=())
    torch.testing.assert_close(site(guide, x, "z").logits, guide.encoder_heads["z"](x.flatten(1)))


def test_relaxed_guide_has_a_temperature_of_its_own():
    model = CategoricalVAE(SHAPE, num_latents=3, num_classes=4, hidden=(6,), relaxed=True)
    guide = RelaxedCategoricalGuide(model, hidden=(6,))
    assert float(guide.temperature) == pytest.approx(2 / 3) and float(model.temperature) == 0.5
    guide.temperature.fill_(0.1)
    assert site(guide, images(), "y").temperature.item() == pytest.approx(0.1)


@pytest.mark.parametrize("name", guides)
def test_a_guide_serves_its_families_and_refuses_the_others_in_one_line(name):
    for model_name, cls in models.items():
        for variant in cls.variants:
            model = cls(**{"data_shape": SHAPE, **variant})
            if name in fitting(model):
                assert guides[name].why_not(model) == ""
                guide = guides[name](model)
                twin = guides[name](model, **json.loads(json.dumps(guide.config)))
                twin.load_state_dict(guide.state_dict())
            else:
                with pytest.raises(BadInput, match=f"cannot serve {cls.__name__}: .*; guides that fit: ") as caught:
                    guides[name](model)
                assert "\n" not in str(caught.value), model_name


def test_every_model_has_a_guide():
    for cls in models.values():
        for variant in cls.variants:
            assert fitting(cls(**{"data_shape": SHAPE, **variant})), cls


def test_discrete_and_relaxed_do_not_mix():
    with pytest.raises(BadInput, match="its latent 'y' is categorical, and the guide serves relaxed-categorical"):
        RelaxedCategoricalGuide(CategoricalVAE(SHAPE))
    with pytest.raises(BadInput, match="its latent 'y' is relaxed-categorical, and the guide serves categorical"):
        CategoricalGuide(CategoricalVAE(SHAPE, relaxed=True))


def test_other_mistakes_are_one_line():
    with pytest.raises(BadInput, match="NormalGuide needs a model that declares its latents, not Linear"):
        NormalGuide(torch.nn.Linear(2, 2))
    with pytest.raises(UnknownName, match="did you mean 'normal'"):
        guides["norml"]
    guide = NormalGuide(GaussianVAE(SHAPE))
    with pytest.raises(BadInput, match=r"^NormalGuide: x has shape \(5, 1, 4, 3\), expected \(B, 1, 4, 4\)"):
        guide(images()[..., :3])
    with pytest.raises(BadInput, match="^NormalGuide: x has NaN"):
        guide(images() * float("nan"))


def test_data_size_reaches_the_guide(param_store):
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,), data_size=20)
    plain = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,))
    plain.load_state_dict(model.state_dict())
    guide, plain_guide = NormalGuide(model), NormalGuide(plain)
    plain_guide.load_state_dict(guide.state_dict())
    x, losses = images(), []
    for pair in ((model, guide), (plain, plain_guide)):
        torch.manual_seed(3)
        losses.append(Trace_ELBO().differentiable_loss(*pair, x))
    torch.testing.assert_close(losses[0], losses[1] * 4)


def test_guides_are_used_by_their_import_path():
    assert guides["gumbo.guides.normal.NormalGuide"] is NormalGuide


def test_a_short_run_of_stock_svi_lowers_the_loss(param_store):
    torch.manual_seed(0)
    x = images(64) * torch.tensor([1.0, 0.0]).repeat(8).reshape(SHAPE)
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(16,))
    svi = SVI(model, NormalGuide(model, hidden=(16,)), pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) / len(x) for _ in range(150)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])

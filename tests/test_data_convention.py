"""fit, evaluate, to_arviz, diagnose and audit take data in one form."""

from __future__ import annotations

import collections

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from gumbo.errors import BadInput
from gumbo.inference import audit, diagnose, evaluate, fit, to_arviz

X = torch.tensor([0.3, -1.2, 0.8, 0.1])
SCALE = torch.tensor([1.0, 1.0])


class Model(PyroModule):
    def forward(self, x, scale, options=None, shift=0):
        assert scale.shape == (2,) and (options is None or options["power"] == 1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale[0]))
            pyro.sample("x", dist.Normal(z, scale[1]), obs=x - shift)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.4))

    def forward(self, x, scale, options=None, shift=0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * (x - shift), 0.7))


OPTIONS = {"power": 1}
FORMS = [(X, SCALE, OPTIONS, 0), {"x": X, "scale": SCALE, "options": OPTIONS, "shift": 0}, (X, SCALE, None)]


def slope_after(data) -> float:
    guide = Guide()
    fit(Model(), guide, data, loss="pathwise", epochs=2, batch_size=3, progress=False, lr=0.1, valid=data)
    return guide.slope.item()


USES = {
    "fit": slope_after,
    "evaluate": lambda data: evaluate(Model(), Guide(), data, num_samples=20, batch_size=3).elbo,
    "to_arviz": lambda data: to_arviz(Model(), Guide(), data, num_samples=20, batch_size=2).posterior["z"].values.sum(),
    "diagnose": lambda data: (
        diagnose(Model(), Guide(), data, num_samples=100, num_simulations=20, refine_steps=0, num_data=3)
        .verdicts[0]
        .value
    ),
    "audit": lambda data: audit(Model(), Guide(), data, estimators=["pathwise"], num_samples=20).total_variance.item(),
}


@pytest.mark.parametrize("use", USES)
def test_a_tuple_is_positional_a_mapping_keywords(use):
    first, *others = (USES[use](form) for form in FORMS)
    assert others == [first, first]


@pytest.mark.parametrize(
    "use",
    [
        lambda *args, **kwargs: to_arviz(Model(), Guide(), *args, **kwargs, num_samples=20).posterior["z"].values.sum(),
        lambda *args, **kwargs: audit(
            Model(), Guide(), *args, **kwargs, estimators=["pathwise"], num_samples=20
        ).total_variance.item(),
    ],
)
def test_arguments_one_by_one_and_keywords_mean_the_same(use):
    found = [use((X, SCALE), shift=0), use(X, SCALE, shift=0), use({"x": X}, scale=SCALE), use(X, scale=SCALE)]
    assert found == [found[0]] * 4


@pytest.mark.parametrize("pair", [collections.namedtuple("Pair", "x scale")(X, SCALE), {"x": X, "scale": SCALE}])
@pytest.mark.parametrize("use", [fit, evaluate, to_arviz])
def test_data_that_are_one_argument_are_said_to_belong_in_a_tuple(use, pair):
    def model(pair):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(BadInput, match=r"a tuple holds the positional arguments .*: pass \(data,\)"):
        use(model, model, pair)


class Sequences(PyroModule):
    """Means of sequences of different lengths, which come packed."""

    def forward(self, packed, prior):
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        with pyro.plate("sequences", len(padded)):
            z = pyro.sample("z", dist.Normal(0.0, prior["scale"]))
            seen = torch.arange(padded.shape[1]) < lengths[:, None]
            with pyro.poutine.mask(mask=seen.T), pyro.plate("time", padded.shape[1], dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=padded.T)


class SequencesGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, packed, prior):
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        with pyro.plate("sequences", len(padded)):
            loc = padded.sum(1) / (lengths + 1)
            pyro.sample("z", dist.Normal(loc, self.scale.abs() / (lengths + 1).sqrt()))


def test_data_without_rows_are_one_batch_everywhere():
    data = (pack_sequence([torch.tensor([0.2, 0.4, 1.0]), torch.tensor([-1.0, 0.0])]), {"scale": 1.0})
    model, guide = Sequences(), SequencesGuide()
    fit(model, guide, data, loss="pathwise", epochs=100, lr=0.03, progress=False)
    assert guide.scale.item() == pytest.approx(1.0, abs=0.02)  # the posterior's is 1 / sqrt(n + 1)
    found = evaluate(model, guide, data, num_samples=50)
    assert found.num_data == 2
    marginal = [
        dist.MultivariateNormal(torch.zeros(len(x)), torch.eye(len(x)) + 1.0).log_prob(x)
        for x in (torch.tensor([0.2, 0.4, 1.0]), torch.tensor([-1.0, 0.0]))
    ]
    assert found.elbo == pytest.approx(sum(marginal).item() / 2, abs=1e-2)
    result = fit(model, guide, data, valid=data, loss="pathwise", epochs=1, lr=1e-6, progress=False)
    assert result.history[-1]["valid_elbo"] == pytest.approx(found.elbo, abs=1e-2)
    assert to_arviz(model, guide, data, num_samples=20).posterior["z"].shape == (1, 20, 2)

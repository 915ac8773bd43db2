"""Hidden Markov models: exact likelihoods against listing, the forward algorithm and Pyro's own ELBO."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from gumbo.errors import UnknownName
from gumbo.experiments.listing import why_not
from gumbo.guides import NoGuide
from gumbo.inference import SiteELBO, evaluate, fit
from gumbo.models import HiddenMarkovModel

pytestmark = pytest.mark.usefixtures("param_store")
KINDS = ("plain", "autoregressive", "factorial", "partially-factorial")


def built(kind, steps=4, states=2):
    torch.manual_seed(0)
    model = HiddenMarkovModel((steps, 3), num_states=states, kind=kind).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, model.example(5)


def listed(model, x, mask):
    """log p(x) as a sum over every sequence of states, by formulas."""
    chains = list(model.decoder_initial)
    steps, states = mask.shape[-1], len(model.decoder_initial["z"])
    total = []
    for path in itertools.product(itertools.product(range(states), repeat=len(chains)), repeat=steps):
        log_p = torch.zeros(len(x)).double()
        for t, at in enumerate(path):
            for chain, state in zip(chains, at, strict=True):
                before = path[t - 1][chains.index(chain)]
                upstream = at[:1] if chain == "z" and model.kind == "partially-factorial" else ()
                table = (model.decoder_transition if t else model.decoder_initial)[chain]
                row = table[(*upstream, *([before] if t else []))]
                log_p = log_p + row.log_softmax(-1)[state]
            logits = model.decoder_emission[at].expand(len(x), -1)
            if model.kind == "autoregressive" and t > 0:
                logits = logits + x[:, t - 1] @ model.decoder_previous
            log_p = log_p + mask[:, t] * dist.Bernoulli(logits=logits).log_prob(x[:, t]).sum(-1)
        total.append(log_p)
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("kind", KINDS)
def test_site_elbo_is_the_exact_likelihood_with_its_gradient(kind):
    model, given = built(kind)
    loss = SiteELBO()(model, NoGuide(model))(**given)
    exact = -listed(model, **given).sum()
    assert torch.isclose(loss, exact)
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(exact, parameters), strict=True)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_stock_enumeration_finds(kind):
    model, given = built(kind, steps=6)
    ours = SiteELBO()(model, NoGuide(model))(**given)
    stock = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, NoGuide(model), **given)
    assert torch.isclose(ours, stock.double() if stock.dtype != ours.dtype else stock)


@pytest.mark.parametrize("kind", KINDS)
def test_pyros_own_example_at_the_same_parameters_has_the_same_likelihood_and_gradient(kind, monkeypatch):
    """Its models 1 to 4, with plates of sequences and tones; and its model 0, one sequence after the other."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    chains = importlib.import_module("_pyro_chains").chains
    model, given = built(kind)
    given["mask"][1, 2:] = 0.0
    given["x"][1, 2:] = 0.0
    parameters = list(model.parameters())
    ours = SiteELBO()(model, NoGuide(model))(**given)
    found = torch.autograd.grad(ours, parameters)
    for plate, nesting in ((True, 2), (False, 1))[: 2 if kind == "plain" else 1]:
        stock = TraceEnum_ELBO(max_plate_nesting=nesting).differentiable_loss(
            chains(model, plate), lambda **_: None, **given
        )
        assert torch.isclose(ours, stock)
        assert all(map(torch.allclose, found, torch.autograd.grad(stock, parameters)))


def test_padding_changes_no_likelihood_and_long_chains_do_not_underflow():
    model, given = built("plain")
    longer = HiddenMarkovModel((200, 3), num_states=2).double()
    longer.load_state_dict(model.state_dict())
    pad = torch.nn.functional.pad
    more = {"x": pad(given["x"], (0, 0, 0, 196)), "mask": pad(given["mask"], (0, 196))}
    one, other = (SiteELBO()(m, NoGuide(m))(**batch) for m, batch in ((model, given), (longer, more)))
    assert torch.isclose(one, other)
    full = longer.inputs(torch.ones(2, 200, 3).double())
    assert SiteELBO()(longer, NoGuide(longer))(**full).isfinite()


def test_evaluation_is_exact_and_by_step():
    model, given = built("plain")
    found = evaluate(model, NoGuide(model), given, num_samples=2)
    exact = listed(model, **given)
    assert torch.allclose(found.values["elbo"].double(), exact, atol=1e-5)
    assert abs(model.per_step(exact, given["mask"]) - exact.sum().item() / given["mask"].sum().item()) < 1e-9


def test_training_finds_states_that_data_were_drawn_from():
    torch.manual_seed(1)
    states = (torch.arange(40)[:, None] + torch.arange(6)) // 3 % 2  # two states, three steps each
    x = torch.bernoulli(torch.tensor([[0.95, 0.95, 0.05], [0.05, 0.05, 0.95]])[states])
    model = HiddenMarkovModel((6, 3), num_states=2)
    fit(model, NoGuide(model), model.inputs(x), loss=SiteELBO(), lr=0.1, batch_size=40, epochs=60, progress=False)
    shares = model.decoder_emission.detach().sigmoid()
    shares = shares if shares[0, 0] > shares[1, 0] else shares.flip(0)
    assert (shares - torch.tensor([[0.95, 0.95, 0.05], [0.05, 0.05, 0.95]])).abs().max() < 0.1


def test_the_states_are_marked_for_listing_and_the_kind_is_known():
    model, given = built("factorial", steps=2)
    assert model.summed == ("w1", "z1", "w2", "z2") and not model.latents
    trace = pyro.poutine.trace(model).get_trace(**given)
    assert all(trace.nodes[name]["infer"]["enumerate"] == "parallel" for name in model.summed)
    with pytest.raises(UnknownName, match="factorial"):
        HiddenMarkovModel((2, 3), kind="coupled")


def test_of_pyros_own_losses_only_enumeration_serves():
    """Its other losses draw the states from the prior, or fail in the middle of a step."""
    model = HiddenMarkovModel((2, 3), num_states=2)
    assert why_not(model, NoGuide(model), "trace-enum") == ""
    assert "only trace-enum" in why_not(model, NoGuide(model), "trace-graph")


def test_a_fault_of_our_own_is_not_shown_as_a_refusal(monkeypatch):
    """Neither raised by our code, nor passed on by Pyro."""
    model = HiddenMarkovModel((2, 3), num_states=2)
    ours = {"__name__": "gumbo.somewhere"}
    exec("def fails(*args, **kwargs):\n    raise ValueError('a slip')", ours)
    monkeypatch.setattr(HiddenMarkovModel, "forward", ours["fails"])
    with pytest.raises(ValueError, match="a slip"):
        why_not(model, NoGuide(model), "trace-enum")

    def theirs(*args, **kwargs):
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(HiddenMarkovModel, "forward", theirs)
    assert why_not(model, NoGuide(model), "trace-enum") == "no such thing"

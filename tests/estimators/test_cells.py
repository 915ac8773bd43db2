"""Every valid cell of model × guide × estimator gives a finite loss and a gradient, and every other one is refused."""

from __future__ import annotations

import math

import pytest
import torch

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.experiments.listing import loss_for
from gumbo.guides import guides
from gumbo.inference.engine.looks import refusals
from gumbo.inference.estimators import estimators
from gumbo.models import models

CORE = ("gaussian-vae", "categorical-vae", "bernoulli-vae")


def pairs():
    for model_name, Model in models.items():
        for number, variant in enumerate(Model.variants):
            model = Model((1, 8, 8), **variant)
            for guide_name, Guide in guides.items():
                if not Guide.why_not(model):
                    quick = model_name in CORE and number == 0 and guide_name != "unconditional"
                    marks = () if quick else pytest.mark.slow
                    name = f"{model_name}-{number}-{guide_name}"
                    yield pytest.param(Model, variant, Guide, id=name, marks=marks)


@pytest.mark.filterwarnings("ignore:.*cuts off:gumbo.errors.GumboWarning")  # truncated-enumerate, of wide tails
@pytest.mark.parametrize("Model, variant, Guide", list(pairs()))
def test_every_cell_trains_or_is_refused(Model, variant, Guide, param_store):
    torch.manual_seed(0)
    model = Model((1, 8, 8), **variant)
    guide = Guide(model)
    batch = model.example(3)
    refused = refusals(model, guide, **batch)
    parameters = [*model.parameters(), *guide.parameters()]
    for word in estimators:
        loss = loss_for(word)(model, guide)
        if refused[word]:
            with pytest.raises(UnsupportedSite):
                loss(**batch)
            continue
        try:
            loss.initialize(**batch)
            loss(**batch)
        except (UnsupportedSite, BadInput) as refusal:  # what the model, or the number of values, does not allow
            assert word in ("enumerate", "concrete") and "\n" not in str(refusal), (word, refusal)
            continue
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            value = loss(**batch)
            assert math.isfinite(value.item()), word
            value.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in parameters), word
            optimizer.step()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters), word

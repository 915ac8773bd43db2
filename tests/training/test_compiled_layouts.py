"""A compiled step reads memory where the captured strides say, and runs what torch runs around a step."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from gumbo.errors import BadInput
from gumbo.guides import BernoulliGuide
from gumbo.inference import SiteELBO, fit
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training.compile import step as compiled
from gumbo.inference.training.compile.backends import uncompiled
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.models import BernoulliVAE

optimizers = import_module("torch.optim.optimizer")  # torch.optim has no attribute of this name


def images(rows: int) -> torch.Tensor:
    return torch.bernoulli(torch.full((rows, 1, 5, 5), 0.4))


LAYOUTS = {
    "contiguous": images,
    "a slice of columns": lambda rows: (
        images(2 * rows).reshape(2 * rows, 25).T.contiguous().T[:rows].reshape(rows, 1, 5, 5)
    ),
    "column by column": lambda rows: images(rows).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other row": lambda rows: images(2 * rows)[::2],
    "one row again and again": lambda rows: images(1).expand(rows, 1, 5, 5),
}


@pytest.mark.parametrize("later", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_every_batch_comes_in_the_layout_that_was_captured(first, later):
    seen = []

    def backend(graph, example):
        def run(*inputs):
            seen.append([(tuple(tensor.shape), tensor.stride()) for tensor in inputs])
            return graph(*inputs)

        seen.append([(tuple(tensor.shape), tensor.stride()) for tensor in example])
        return run

    model = BernoulliVAE((1, 5, 5), num_latents=3, hidden=(4,))
    loss, optimizer = SiteELBO("disarm"), make_optimizer("adam", 1e-3)[0]
    step = CompiledStep(model, BernoulliGuide(model), loss, optimizer, Rows(LAYOUTS[first](6)), backend=backend)
    step(Rows(LAYOUTS[later](6)))
    assert len(seen) >= 3
    assert all(one == seen[0] for one in seen)


class Linear(PyroModule):
    """Data that are a linear map of a point; there is no noise."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("matrix", torch.eye(4) + torch.arange(16.0).view(4, 4) / 10)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) @ self.matrix * self.scale, 1.0).to_event(1), obs=x)


class Point(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x)).to_event(1))


def trained(compile: bool, prepare=lambda model: None, after_epoch=lambda model: None, **options) -> torch.Tensor:
    """The parameters after three epochs of five batches, the last of which is smaller."""
    torch.manual_seed(0)
    model, guide = Linear(), Point()
    prepare(model)
    x = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
    options = {"epochs": 3, "batch_size": 16, "lr": 0.01, "progress": False, "loss": SiteELBO()} | options
    fit(model, guide, x, compile=compile, on_epoch=lambda epoch: after_epoch(model), **options)
    return nn.utils.parameters_to_vector([*model.parameters(), *guide.parameters()]).detach()


REPLACED = {
    "of another type": lambda model: setattr(model, "scale", torch.tensor(0.5, dtype=torch.float64)),
    "of whole numbers": lambda model: setattr(model, "scale", torch.tensor(2)),
    "turned": lambda model: setattr(model, "matrix", model.matrix.clone().t().contiguous().t()),
    "of another shape": lambda model: setattr(model, "scale", torch.full((4,), 0.5)),
    "one number for all": lambda model: setattr(model, "matrix", torch.ones(1, 1).expand(4, 4)),
}


@pytest.mark.parametrize("change", REPLACED)
def test_a_buffer_that_lies_otherwise_is_captured_again(change, monkeypatch):
    seen = []

    def backend(graph, example):
        """Refuses what compiled code would misread."""
        lies = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in example]
        seen.append(lies)

        def run(*inputs):
            if [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in inputs] != lies:
                pytest.fail("an input lies otherwise than the example")  # no error that somebody handles
            return graph(*inputs)

        return run

    monkeypatch.setattr(compiled, "inductor", backend)
    options = {"after_epoch": REPLACED[change], "valid": torch.ones(10, 4)}
    torch.testing.assert_close(trained(True, **options), trained(False, **options), rtol=1e-5, atol=1e-6)
    assert len(seen) >= 2


@pytest.mark.slow
def test_the_compiler_gets_a_buffer_whose_elements_share_memory_as_it_lies():
    def prepare(model):
        model.matrix = torch.ones(1, 1).expand(4, 4)

    expected = trained(False, prepare)
    torch.testing.assert_close(trained(True, prepare), expected, rtol=1e-5, atol=1e-6)


def test_a_buffer_that_a_transform_replaces_is_that_of_the_next_step(monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    found = []
    for compile in (False, True):
        held = []

        def transform(batch, generator, held=held):
            held[0].scale = held[0].scale * 0.9
            return batch

        found.append(trained(compile, held.append, transform=transform))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def masked(gradient):
    return gradient * torch.tensor([[0.0], [1.0], [1.0], [0.0]])


def doubled(parameter):
    parameter.grad = 2 * parameter.grad


GRADIENT_HOOKS = {
    "register_hook": lambda model: model.decoder.weight.register_hook(masked),
    "register_post_accumulate_grad_hook": lambda model: model.decoder.weight.register_post_accumulate_grad_hook(
        doubled
    ),
}


@pytest.mark.parametrize("kind", GRADIENT_HOOKS)
@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_hooks_on_gradients_are_refused(kind, when, optimizer, monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    hooks = {"prepare" if when == "before" else "after_epoch": GRADIENT_HOOKS[kind]}
    with pytest.raises(BadInput, match="'model.decoder.weight' has a hook on its gradient .*compile=False"):
        trained(True, optimizer=optimizer, **hooks)


def clamped(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data.clamp_(-0.1, 0.1)


def without_matrices(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(parameter.dim() == 1)


OPTIMIZER_HOOKS = {"register_step_post_hook": clamped, "register_step_pre_hook": without_matrices}


@pytest.mark.parametrize("kind", OPTIMIZER_HOOKS)
@pytest.mark.parametrize("when", ["before", "later", "everywhere"])
def test_hooks_of_an_optimizer_run_at_every_step(kind, when, monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    made, handles = [], []

    def make(parameters):
        made.append(torch.optim.Adam(parameters, lr=0.01))
        if when == "before":
            getattr(made[-1], kind)(OPTIMIZER_HOOKS[kind])
        return made[-1]

    def hook(model):
        if when == "later" and len(handles) < len(made):
            handles.append(getattr(made[-1], kind)(OPTIMIZER_HOOKS[kind]))

    if when == "everywhere":
        everywhere = {"register_step_post_hook": "post", "register_step_pre_hook": "pre"}[kind]
        register = getattr(optimizers, f"register_optimizer_step_{everywhere}_hook")
        handles.append(register(OPTIMIZER_HOOKS[kind]))
    try:
        found = [trained(compile, after_epoch=hook, optimizer=make) for compile in (False, True)]
    finally:
        if when == "everywhere":
            handles[0].remove()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], trained(False, optimizer=partial(torch.optim.Adam, lr=0.01)))

"""A compiled step beside an eager one of equal programs, on the same noise."""

from __future__ import annotations

import copy

import pytest
import torch

from gumbo.guides import NormalGuide
from gumbo.inference.engine.noise import Tape
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training.compile.backends import uncompiled
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import GaussianVAE

SHAPE = (1, 2, 3)
F64 = torch.float64


def normal_pair():
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(5,))
    return model, NormalGuide(model)


def data(rows=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(rows, *SHAPE, generator=generator) < 0.5).to(dtype)


def steps_of(pair, loss, optimizer="adam", dtype=F64, backend=uncompiled, x=None):
    """A compiled step, and an eager one of equal programs."""
    x = data(dtype=dtype) if x is None else x
    model, guide = (program.to(dtype) for program in pair())
    twin = copy.deepcopy((model, guide))
    make = make_optimizer(optimizer, 1e-2)[0] if isinstance(optimizer, str) else optimizer
    compiled = CompiledStep(model, guide, loss, make, Rows(x, "x"), backend)
    eager = TorchStep(*twin, copy.deepcopy(loss), make, Rows(x, "x"))
    eager.module.load_state_dict(compiled.module.state_dict())  # networks that the losses built
    return compiled, eager


def agree(compiled, eager, batches, tolerance, first_step=100):
    """Both steps over the batches on the same noise: the same losses, and the same state after each."""
    for step in (compiled, eager):
        step.module.binding.steps = first_step
        for state in step.module.binding.states.values():
            state.calls = first_step
    for x in batches:
        mine = compiled(Rows(x, "x"))
        with Tape(compiled.noise):
            other = eager(Rows(x, "x"))
        assert mine == pytest.approx(other, rel=tolerance)
        expected = eager.module.state_dict()
        for name, value in compiled.module.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)
            else:
                assert value == expected[name]

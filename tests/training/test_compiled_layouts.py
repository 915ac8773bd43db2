"""A compiled step reads memory where the captured strides say: every batch must lie as the first one did."""

from __future__ import annotations

import pytest
import torch

from gumbo.guides import BernoulliGuide
from gumbo.inference import SiteELBO
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.models import BernoulliVAE


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

"""The compiled step: distributions that look at values, made under validation or by a mask."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import transforms

from gumbo.inference import SiteELBO
from gumbo.inference.engine.noise import Tape
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training.compile.backends import uncompiled
from gumbo.inference.training.compile.capture import triangles_by_index
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))


class Regression(PyroModule):
    """Pyro's tutorial: priors that are expanded when the module is made, under validation."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.LogNormal(0.0, 1.0).expand([1]).mask(True).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


class Correlated(PyroModule):
    def forward(self, x):
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(2)).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(1.5)))
        with pyro.plate("data", len(x)):
            law = dist.MultivariateNormal(torch.zeros(2), scale_tril=scale.sqrt()[:, None] * factor)
            pyro.sample("x", law, obs=x)


class CorrelatedMatrices(PyroModule):
    """A correlation matrix and a factor for each group, whose concentration is drawn too."""

    def forward(self, x):
        concentration = pyro.sample("concentration", dist.Gamma(2.0, 1.0))
        correlation = pyro.sample("correlation", dist.LKJ(3, 1 + concentration))
        with pyro.plate("groups", 2):
            factors = pyro.sample("factors", dist.LKJCholesky(3, 1 + concentration))
        covariance = correlation + (factors @ factors.mT).sum(0)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), covariance), obs=x)


def masks_in(graph: torch.fx.GraphModule) -> list[str]:
    """Operations that take a truth value as an index: their shapes depend on values, and no compiler takes them."""
    found = []
    for node in graph.graph.nodes:
        if "index" in str(node.target):
            indices = [i for part in node.args if isinstance(part, (list, tuple)) for i in part if i is not None]
            found += [str(node) for i in indices if i.meta["val"].dtype == torch.bool]
    return found


@pytest.mark.parametrize(
    "kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
@pytest.mark.parametrize(
    "program, data", [(Regression, (X, X.sum(1))), (Correlated, X), (CorrelatedMatrices, torch.cat([X, X[:, :1]], 1))]
)
def test_distributions_made_under_validation_and_triangular_ones_are_captured(kind, program, data):
    assert pyro.infer.util.is_validation_enabled()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return uncompiled(graph, inputs)

    def guided():
        model = program()
        return model, kind(model, init_scale=0.1)

    make, rows = make_optimizer("adam", 1e-2)[0], Rows(data)
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        compiled = CompiledStep(*guided(), SiteELBO("pathwise"), make, rows, backend)
        torch.manual_seed(0)
        eager = TorchStep(*guided(), SiteELBO("pathwise"), make, rows)
        eager.module.load_state_dict(compiled.module.state_dict())
        for _ in range(3):
            mine = compiled(rows)
            with Tape(compiled.noise):
                assert mine == pytest.approx(eager(rows), rel=1e-5)
    assert not any(masks_in(graph) for graph in graphs)


@pytest.mark.parametrize("diagonal", [0, -1, -2])
def test_triangles_by_index_are_torchs(diagonal):
    matrix = torch.arange(32.0).reshape(2, 4, 4)
    vector = transforms.tril_matrix_to_vec(matrix, diag=diagonal)
    back = transforms.vec_to_tril_matrix(vector, diag=diagonal) if diagonal > -2 else None
    with triangles_by_index():
        assert torch.equal(transforms.tril_matrix_to_vec(matrix, diag=diagonal), vector)
        assert back is None or torch.equal(transforms.vec_to_tril_matrix(vector, diag=diagonal), back)

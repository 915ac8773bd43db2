"""Products handed to oneDNN are the same products."""

from __future__ import annotations

import pytest
import torch
from torch import library as operations
from torch.fx.experimental.proxy_tensor import make_fx

from gumbo.inference.training.compile import products
from gumbo.inference.training.compile.products import SMALLEST, layers_through_onednn, linear_layers, through_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def captured(function, *inputs):
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    return through_onednn(graph), [str(node.target) for node in graph.graph.nodes]


def loss_and_gradients(x, weight, bias):
    """A layer and its backward pass: every layout that training meets."""
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    x = x.detach().requires_grad_()
    loss = torch.nn.functional.linear(x, weight, bias).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, weight, bias])]


def layer(rows, inputs, outputs, dtype=torch.float32):
    return torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype) / 9, torch.randn(outputs)


def test_large_products_are_handed_over_and_equal():
    inputs = layer(64, 160, 130)
    graph, targets = captured(loss_and_gradients, *inputs)
    assert targets.count("gumbo.linear.default") == 3
    assert not {"aten.mm.default", "aten.addmm.default"} & set(targets)
    for ours, torchs in zip(graph(*inputs), loss_and_gradients(*inputs), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_columns_and_slices_are_read_where_they_lie():
    a, b = torch.randn(300, 70), torch.randn(140, 300)

    def products(a, b):
        return a.T @ b.T, a[:, 3:67] @ b[::2, :64].T, a[::2].T @ b.T[1::2]

    graph, targets = captured(products, a, b)
    assert targets.count("gumbo.linear.default") == 3
    for ours, torchs in zip(graph(a, b), products(a, b), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes, dtype", [((8, 16, 4), torch.float32), ((64, 160, 130), torch.float64)])
def test_small_and_double_products_stay(sizes, dtype):
    x, weight, _ = layer(*sizes, dtype=dtype)
    assert dtype is torch.float64 or x.numel() * len(weight) < SMALLEST
    _, targets = captured(lambda x, w: x @ w.T, x, weight)
    assert "aten.mm.default" in targets and "gumbo.linear.default" not in targets


def test_a_bias_that_is_no_vector_stays():
    x, weight, _ = layer(64, 160, 130)
    _, targets = captured(torch.addmm, torch.randn(64, 130), x, weight.T)
    assert "aten.addmm.default" in targets


def test_shapes_are_known_to_the_compiler():
    x, weight, bias = layer(64, 160, 130)
    through_onednn(make_fx(torch.nn.functional.linear)(x, weight, bias))
    operations.opcheck(torch.ops.gumbo.linear.default, (x, weight, bias), test_utils=["test_schema", "test_faketensor"])


def slopes_of_slopes(net, x):
    """Value, first and second derivatives."""
    x = x.clone().requires_grad_()
    value = net(x).square().sum()
    first = torch.autograd.grad(value, [x, *net.parameters()], create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), [x, *net.parameters()])
    return [value.detach(), *(one.detach() for one in first), *second]


@pytest.mark.parametrize("shape", [(64, 160), (4, 16, 160)])
def test_an_eager_layer_and_its_derivatives_are_torchs(monkeypatch, shape):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "SMALLEST_EAGER", 2)
    calls = []
    torchs = products._Linear.apply
    monkeypatch.setattr(products._Linear, "apply", lambda *args: calls.append(1) or torchs(*args))
    net = torch.nn.Sequential(torch.nn.Linear(160, 90), torch.nn.Tanh(), torch.nn.Linear(90, 30, bias=False))
    x = torch.randn(*shape)
    expected = slopes_of_slopes(net, x)
    with layers_through_onednn(linear_layers([net])):
        found = slopes_of_slopes(net, x)
        vectorized = torch.vmap(net)(x)
    assert calls and not any("forward" in vars(layer) for layer in net)
    torch.testing.assert_close(vectorized, net(x))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_layers_that_are_not_plain_are_left_alone(monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    own = torch.nn.Linear(3, 3)
    own.forward = lambda x: x
    layers = [own, torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3)), torch.nn.Linear(3, 3)]
    assert linear_layers([torch.nn.ModuleList(layers)]) == [layers[2]]
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    assert linear_layers([torch.nn.ModuleList(layers)]) == []

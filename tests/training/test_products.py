"""Products handed to oneDNN are the same products, and the library is a measured and recorded choice."""

from __future__ import annotations

import pytest
import torch
from torch import library as operations
from torch.fx.experimental.proxy_tensor import make_fx

from gumbo.errors import BadInput, UnknownName
from gumbo.guides import NormalGuide
from gumbo.inference import SiteELBO, fit
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training.checkpoints import load_checkpoint
from gumbo.inference.training.compile import products
from gumbo.inference.training.compile import step as compiled
from gumbo.inference.training.compile.backends import inductor, uncompiled
from gumbo.inference.training.compile.products import SMALLEST, through_onednn
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import GaussianVAE

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
    assert targets.count("gumbo.product.default") == 3
    assert not {"aten.mm.default", "aten.addmm.default"} & set(targets)
    for ours, torchs in zip(graph(*inputs), loss_and_gradients(*inputs), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_columns_and_slices_are_read_where_they_lie():
    a, b = torch.randn(300, 70), torch.randn(140, 300)

    def products(a, b):
        return a.T @ b.T, a[:, 3:67] @ b[::2, :64].T, a[::2].T @ b.T[1::2]

    graph, targets = captured(products, a, b)
    assert targets.count("gumbo.product.default") == 3
    for ours, torchs in zip(graph(a, b), products(a, b), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes, dtype", [((8, 16, 4), torch.float32), ((64, 160, 130), torch.float64)])
def test_small_and_double_products_stay(sizes, dtype):
    x, weight, _ = layer(*sizes, dtype=dtype)
    assert dtype is torch.float64 or x.numel() * len(weight) < SMALLEST
    _, targets = captured(lambda x, w: x @ w.T, x, weight)
    assert "aten.mm.default" in targets and "gumbo.product.default" not in targets


@pytest.mark.parametrize("shape", [(64, 130), (130,), (64, 1)])
def test_whatever_is_added_is_added(shape):
    x, weight, _ = layer(64, 160, 130)
    bias = torch.randn(shape)
    graph, targets = captured(torch.addmm, bias, x, weight.T)
    assert "gumbo.product.default" in targets
    torch.testing.assert_close(graph(bias, x, weight.T), torch.addmm(bias, x, weight.T), rtol=1e-4, atol=1e-4)


def test_shapes_are_known_to_the_compiler():
    x, weight, bias = layer(64, 160, 130)
    through_onednn(make_fx(torch.nn.functional.linear)(x, weight, bias))
    operations.opcheck(torch.ops.gumbo.product.default, (x, weight), test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("rows", [32, 512])
def test_the_compilers_code_has_the_same_products(rows):
    """A few rows, whose forward product is turned, and many; what follows may view the result as rows."""

    def net(x, weight, bias, other):
        weight, x = weight.detach().requires_grad_(), x.detach().requires_grad_()
        hidden = torch.nn.functional.linear(x.view(rows // 4, 4, 200), weight, bias).relu()
        loss = (hidden.view(-1) * hidden.reshape(rows, 180).mm(other).mm(other.t()).view(-1)).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [x, weight])]

    inputs = [torch.randn(rows, 200) / 9, torch.randn(180, 200) / 9, torch.randn(180), torch.randn(180, 190) / 9]
    graph, targets = captured(net, *inputs)
    assert targets.count("gumbo.product.default") >= 5
    expected, run = net(*inputs), inductor(graph, inputs)
    for ours, torchs in zip(run(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3 * torchs.abs().max().item())


def test_the_library_is_the_one_that_takes_less_time(monkeypatch):
    net = torch.nn.Linear(1024, 1024)
    for torchs, onednns, expected in ((1.0, 0.5, "onednn"), (1.0, 0.95, "torch"), (0.5, 1.0, "torch")):
        products._faster.cache_clear()
        monkeypatch.setattr(products, "fastest_of", lambda rivals, t=torchs, o=onednns: {"torch": t, "onednn": o})
        assert products.choose_library("fastest", [net], 64, "cpu") == expected
    products._faster.cache_clear()


def test_the_rivals_that_are_measured_compute_the_same(monkeypatch):
    def found(rivals):
        torchs, onednns = (run() for run in rivals.values())
        for ours, theirs in zip(torchs, onednns, strict=True):
            torch.testing.assert_close(ours, theirs if ours.shape == theirs.shape else theirs.t())
        return dict.fromkeys(rivals, 1.0)

    monkeypatch.setattr(products, "fastest_of", found)
    before = torch.get_rng_state()
    for rows in (8, 64):
        products._times_of(rows, 24, 40)
    assert torch.equal(before, torch.get_rng_state())


def test_small_programs_and_words_need_no_measurement(monkeypatch):
    monkeypatch.setattr(products, "fastest_of", lambda rivals: pytest.fail("measured"))
    assert products.choose_library("fastest", [torch.nn.Linear(3, 3)], 64, "cpu") == "torch"
    assert products.choose_library("onednn", [torch.nn.Linear(1024, 1024)], 64, "cpu") == "onednn"
    assert products.choose_library("fastest", [torch.nn.Linear(1024, 1024)], 64, "cuda") == "torch"
    with pytest.raises(BadInput, match="needs a torch with oneDNN and programs on the CPU"):
        products.choose_library("onednn", [torch.nn.Linear(3, 3)], 64, "cuda")
    with pytest.raises(UnknownName, match="products"):
        products.choose_library("mkl", [], 64, "cpu")
    model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,))
    with pytest.raises(BadInput, match="pass compile=True"):
        fit(model, NormalGuide(model), torch.zeros(8, 1, 4, 4), products="torch", progress=False)


def test_eager_steps_leave_the_layers_alone():
    """No layer has another forward while an eager step runs, and no operation of oneDNN's is called."""
    model = GaussianVAE((1, 28, 28), latent_dim=2, hidden=(400,))
    seen = []
    model.decoder.register_forward_hook(
        lambda module, *_: seen.append([name for part in module.modules() for name in vars(part) if name == "forward"])
    )
    x = Rows(torch.zeros(64, 1, 28, 28))
    step = TorchStep(model, NormalGuide(model), SiteELBO("pathwise"), make_optimizer("adam", 1e-3)[0], x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(x)
    assert seen and not any(seen)
    assert not [event.key for event in profile.key_averages() if "_linear_pointwise" in event.key]


def test_a_resumed_run_keeps_its_library(tmp_path, monkeypatch):
    """The first run measures; the second takes what stands in the checkpoint, whatever it would measure now."""
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    choose, asked = products.choose_library, []

    def measured(word, *rest):
        asked.append(word)
        return "onednn" if word == "fastest" else choose(word, *rest)

    monkeypatch.setattr(compiled, "choose_library", measured)

    def run(epochs, resume=False, **options):
        torch.manual_seed(0)
        model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,))
        options = {"compile": True, "batch_size": 8, "progress": False, "run_dir": tmp_path} | options
        data = torch.zeros(8, 1, 4, 4)
        return fit(model, NormalGuide(model), data, loss=SiteELBO("pathwise"), epochs=epochs, resume=resume, **options)

    run(1)
    run(2, resume=True)
    assert asked == ["fastest", "onednn"]
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["settings"]["products"] == "onednn"
    with pytest.raises(BadInput, match="products: onednn there, torch here"):
        run(3, resume=True, products="torch")

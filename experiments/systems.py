"""``gumbo system NAME``: small runs that each show one thing, with a picture and its numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments._command import run_command
from gumbo.experiments._runs import RunFolder


@dataclass
class System:
    """Run one of the systems: manifold, gumbel-max, covariance, warm-up, regression, natural-gradient, policy or
    semi-supervised.

    Args:
        name: which system.
        quick: a small run, for a first look and for tests.
        data: the images that manifold and semi-supervised learn; of mnist only the test split is read.
        epochs: training epochs, where the system trains on images; by default its own number.
        seed: initial weights, batches and noise.
        seeds: how many seeds semi-supervised takes, from ``seed`` on; by default 3.
        labels: how many labels semi-supervised sees, as many of each class.
        folder: the run folder; by default ./runs/system-<time>.
        trust: import what the config.yaml of a run, given as `--config`, names by import path.
    """

    name: str
    quick: bool = False
    data: str = "digits"
    epochs: int | None = None
    seed: int = 0
    seeds: int | None = None
    labels: int = 100
    folder: str | None = None
    trust: bool = False


def system(config: System) -> dict[str, Any]:
    """Run it, write ``results.json`` and ``plots/``, and print the numbers."""
    import torch

    if config.name not in SYSTEMS:
        raise UnknownName("system", config.name, SYSTEMS)
    run = RunFolder.create("system", config, config.folder)
    print(f"gumbo system {config.name}: into {run.path}", file=sys.stderr)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        results = SYSTEMS[config.name](config, run)
    run.write_json("results.json", results)
    show(results)
    return results


def show(results: dict[str, Any], indent: str = "") -> None:
    for name, value in results.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name:32} {f'{value:.4g}' if isinstance(value, float) else value}")


def images(config: System):
    """Binarized images to learn from; MNIST's training images are seldom at hand, and its test images do."""
    from gumbo.experiments.data import load

    if config.data == "mnist":
        return load("mnist", binarize="static", splits=["test"]).test
    return load(config.data, binarize="static").train


# --- the two-dimensional manifold of a convolutional VAE


def manifold(config: System, run: RunFolder) -> dict[str, Any]:
    """ConvVAE with two latents: what each point of the latent plane decodes to."""
    import numpy as np
    import torch

    from gumbo.experiments.plots import figure, save
    from gumbo.guides import NormalGuide
    from gumbo.inference import evaluate, fit
    from gumbo.models import ConvVAE

    x = images(config)
    held, x = x[: len(x) // 10], x[len(x) // 10 :]
    if config.quick:
        held, x = held[:100], x[:500]
    model = ConvVAE(x.shape[1:], channels=(8, 16) if config.quick else (32, 64))
    guide = NormalGuide(model)
    epochs = config.epochs or (2 if config.quick else 30)
    fit(model, guide, x, valid=held, epochs=epochs, lr=2e-3, seed=config.seed, title="manifold")
    found = evaluate(model, guide, held, num_samples=50)
    side = 8 if config.quick else 20
    places = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
    with torch.no_grad():
        grid = torch.stack([places.expand(side, side), places.flip(0).unsqueeze(1).expand(side, side)], -1)
        pictures = model.likelihood(grid).mean[..., 0, :, :].numpy()
    height, width = pictures.shape[-2:]
    made, axes = figure(figsize=(8, 8))
    sheet = pictures.transpose(0, 2, 1, 3).reshape(side * height, side * width)
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
    ticks = np.linspace(0, side - 1, 5).round().astype(int)
    axes.set_xticks((ticks + 0.5) * width, [f"{places[t]:.1f}" for t in ticks])
    axes.set_yticks((ticks + 0.5) * height, [f"{places[side - 1 - t]:.1f}" for t in ticks])
    axes.set(title="decoder means over the latent plane, at equal prior mass", xlabel="z₁", ylabel="z₂")
    save(made, run.plots / "manifold.png")
    return {"images": len(x), "epochs": epochs, "held-out ELBO (nats)": found.elbo, "log p(x)": found.log_evidence}


# --- Gumbel-max draws


def gumbel_max(config: System, run: RunFolder) -> dict[str, Any]:
    """argmax (log π + g) against π, the ink of the digits' pixels, by a χ² test; and with the noise's sign slipped."""
    import torch
    from scipy.stats import chisquare

    from gumbo.experiments.data import load
    from gumbo.experiments.plots import figure, save

    ink = load("digits").train.double().mean(0).flatten() + 1e-3
    pi = ink / ink.sum()
    draws = 20_000 if config.quick else 200_000
    noise = -(-torch.rand(draws, len(pi), dtype=torch.float64).log()).log()
    found: dict[str, Any] = {"draws": draws, "classes": len(pi)}
    panels = {"π: the ink of each pixel": pi}
    for name, sign in (("log π + g", 1), ("log π − g (the slip)", -1)):
        counts = torch.bincount((pi.log() + sign * noise).argmax(-1), minlength=len(pi))
        test = chisquare(counts.numpy(), (draws * pi).numpy())
        found[name] = {"chi-squared": float(test.statistic), "p-value": float(test.pvalue)}
        panels[f"frequencies of argmax({name})"] = counts / draws
    made, axes = figure(1, 3, figsize=(11, 3.6))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        shown = axis.imshow(values.reshape(8, 8).numpy(), cmap="viridis", vmin=0, vmax=pi.max())
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    made.colorbar(shown, ax=list(axes), shrink=0.8)
    save(made, run.plots / "gumbel_max.png")
    return found


# --- full covariance and flows against a diagonal posterior

CORRELATION = 0.95


def factor_model(x):
    """Two factors of the images whose exact posterior is a Normal of that correlation; and log p(x) of each image."""
    import pyro
    import pyro.distributions as dist
    import torch

    from gumbo.models import GenerativeModel, Latent

    flat = x.flatten(1)
    centre = flat.mean(0)
    _, _, directions = torch.linalg.svd(flat - centre, full_matrices=False)
    precision = 20.0 * torch.tensor([[1.0, -CORRELATION], [-CORRELATION, 1.0]])
    root = torch.linalg.cholesky(precision - torch.eye(2)).mH
    loadings = directions[:2].mH @ root

    class Factors(GenerativeModel):
        def __init__(self):
            super().__init__(x.shape[1:])
            self.latents = {"z": Latent("normal", (2,))}
            self.register_buffer("loadings", loadings)

        def forward(self, x=None, *, batch_size=1):
            with self.data_plate(x, batch_size):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                mean = (centre + z @ self.loadings.mH).unflatten(-1, self.data_shape)
                return pyro.sample("x", dist.Normal(mean, 1.0).to_event(len(self.data_shape)), obs=x)

    covariance = torch.linalg.inv(precision)
    means = (flat - centre) @ loadings @ covariance
    evidence = dist.LowRankMultivariateNormal(centre, loadings, torch.ones(len(centre))).log_prob(flat)
    return Factors(), means, covariance, evidence


def covariance(config: System, run: RunFolder) -> dict[str, Any]:
    """What a diagonal guide loses to a posterior of correlation 0.95, and that a full covariance and a flow do not."""
    import math

    import torch

    from gumbo.experiments.data import load
    from gumbo.experiments.plots import figure, save
    from gumbo.guides import FlowGuide, NormalGuide, TriangularNormalGuide
    from gumbo.inference import evaluate, fit

    x = load("digits").train
    model, means, covariance, evidence = factor_model(x)
    epochs = config.epochs or (10 if config.quick else 60)
    found: dict[str, Any] = {
        "log p(x), exact": evidence.mean().item(),
        "best gap of a diagonal": -0.5 * math.log(1 - CORRELATION**2),
    }
    made, axes = figure(1, 3, figsize=(11, 4), sharex=True, sharey=True)
    exact = torch.distributions.MultivariateNormal(means[0], covariance).sample((1000,))
    for axis, (name, make) in zip(
        axes,
        {"normal": NormalGuide, "triangular-normal": TriangularNormalGuide, "flow": FlowGuide}.items(),
        strict=True,
    ):
        guide = make(model, hidden=(64,))
        for lr in (5e-3, 1e-3):
            fit(model, guide, x, epochs=epochs // 2, lr=lr, seed=config.seed, title=name)
        gap = evidence.mean().item() - evaluate(model, guide, x, num_samples=50).elbo
        found[name] = {"gap to log p(x) (nats)": gap}
        with torch.no_grad():
            draws = guide(x[:1].expand(1000, *x.shape[1:]))["z"]
        _clear_store()
        axis.plot(*exact.T, ".", color="lightgray", markersize=3, label="exact posterior")
        axis.plot(*draws.T, ".", color="tab:blue", markersize=2, label=name)
        axis.set(title=f"{name}: gap {gap:.3f} nats", xlabel="z₁")
        axis.legend(fontsize=8, loc="upper left")
    axes[0].set_ylabel("z₂")
    save(made, run.plots / "covariance.png")
    return found


def _clear_store() -> None:
    import pyro

    pyro.clear_param_store()


# --- KL warm-up against collapse


def warm_up(config: System, run: RunFolder) -> dict[str, Any]:
    """A deep VAE whose latents collapse, and do not under KL warm-up (linear, cyclical) or free bits."""
    import torch

    from gumbo.experiments.data import load
    from gumbo.experiments.plots import colours, figure, save
    from gumbo.guides import NormalGuide
    from gumbo.inference import Cyclical, FreeBits, Linear, SiteELBO, active_units, evaluate, fit
    from gumbo.models import GaussianVAE

    data = load("digits", binarize="static")
    epochs = config.epochs or (2 if config.quick else 60)
    steps = epochs * -(-len(data.train) // 64)
    losses = {
        "none": SiteELBO(),
        "linear": SiteELBO(kl_weight=Linear(steps // 2)),
        "cyclical": SiteELBO(kl_weight=Cyclical(steps, cycles=4)),
        "free bits": FreeBits(0.1),
    }
    palette = colours(list(losses))
    made, axis = figure(figsize=(6.5, 4))
    found: dict[str, Any] = {"epochs": epochs, "latent dimensions": 20}
    for name, loss in losses.items():
        torch.manual_seed(config.seed)
        model = GaussianVAE((1, 8, 8), latent_dim=20, hidden=(128, 128, 128), likelihood="bernoulli")
        guide = NormalGuide(model)
        fit(model, guide, data.train, loss=loss, epochs=epochs, batch_size=64, lr=2e-3, seed=config.seed, title=name)
        judged = evaluate(model, guide, data.test, num_samples=50)
        found[name] = {
            "active units": int(active_units(guide, data.test)["z"].sum()),
            "test ELBO (nats)": judged.elbo,
            "rate (nats)": judged.rate,
        }
        with torch.no_grad():
            spread = guide.encoder_heads["z"](guide.encoder(data.test))[:, :20].var(0).sort(descending=True).values
        axis.semilogy(range(1, 21), spread, "o-", markersize=3, color=palette[name], label=name)
    axis.axhline(0.01, color="black", linewidth=0.8, linestyle=":", label="threshold of an active unit")
    axis.set(title="units in use", xlabel="latent dimension, by rank", ylabel="Var over x of E[z given x]")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)
    save(made, run.plots / "warm_up.png")
    return found


# --- networks that output a distribution


def diabetes():
    """scikit-learn's 442 patients: ten measurements, and the disease's progress a year later; standardised."""
    import torch
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = torch.as_tensor(x), torch.as_tensor(y).unsqueeze(-1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(20130))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return (x[order[:342]], y[order[:342]]), (x[order[342:]], y[order[342:]])


def regression(config: System, run: RunFolder) -> dict[str, Any]:
    """Progress of diabetes from body mass: a network with its own spread at each input, and one with latent weights."""
    import torch

    from gumbo.experiments.plots import figure, save
    from gumbo.guides import AutoGuide, NoGuide
    from gumbo.inference import evaluate, fit
    from gumbo.models import BayesianRegression, HeteroscedasticRegression

    (x, y), (x_test, y_test) = diabetes()
    body_mass = 2
    train = {"x": x[:, [body_mass]].float(), "y": y.float()}
    test = {"x": x_test[:, [body_mass]].float(), "y": y_test.float()}
    grid = torch.linspace(float(train["x"].min()), float(train["x"].max()), 100).unsqueeze(-1)
    epochs = config.epochs or (20 if config.quick else 300)
    made, axes = figure(1, 2, figsize=(10, 4), sharey=True)
    found: dict[str, Any] = {}
    network = HeteroscedasticRegression((1,), hidden=(16,), activation="tanh")
    weights = BayesianRegression((1,), hidden=(16,))
    pairs = {"heteroscedastic": (network, NoGuide(network)), "Bayesian": (weights, AutoGuide(weights))}
    for axis, (name, (model, guide)) in zip(axes, pairs.items(), strict=True):
        fit(model, guide, train, epochs=epochs, batch_size=len(x), lr=1e-2, seed=config.seed, title=name)
        judged = evaluate(model, guide, test, num_samples=500)
        found[name] = {"test log p(y given x) (nats)": judged.log_predictive}
        with torch.no_grad():
            draws = _predictive(model, guide, grid, 200 if config.quick else 2000)
        mean, sd = draws.mean(0), draws.std(0)
        axis.plot(train["x"], train["y"], ".", color="gray", markersize=3)
        axis.plot(grid, mean, color="tab:blue")
        for band in (1, 2):
            axis.fill_between(grid[:, 0], mean - band * sd, mean + band * sd, alpha=0.2, color="tab:blue", linewidth=0)
        axis.set(title=f"{name}: ±1 and ±2 sd", xlabel="body mass index (standardised)")
    axes[0].set_ylabel("progress (standardised)")
    save(made, run.plots / "regression.png")
    return found


def _predictive(model, guide, x, count: int):
    """Draws of y at each x, ``(count, rows)``, each under its own draw of the guide."""
    import pyro
    import torch
    from pyro import poutine

    draws = []
    with pyro.get_param_store().scope():
        for _ in range(count):
            trace = poutine.trace(guide).get_trace(x)
            draws.append(poutine.replay(model, trace=trace)(x)[:, 0])
    return torch.stack(draws)


# --- natural gradients


def natural_gradient(config: System, run: RunFolder) -> dict[str, Any]:
    """Steps against Adam: a mean-field Gaussian with a known optimum, and heteroscedastic regression on real data."""
    import torch

    from gumbo.experiments.plots import figure, save
    from gumbo.models import HeteroscedasticRegression

    steps = 60 if config.quick else 400
    (x, y), _ = diabetes()

    def fresh():
        torch.manual_seed(config.seed)
        return HeteroscedasticRegression((10,), hidden=(16,), activation="tanh").double()

    gaussian = {name: descend(*mean_field(), how, steps) for name, how in METHODS.items()}
    networks = {}
    for name, how in METHODS.items():
        model = fresh()
        losses = descend(
            list(model.parameters()),
            lambda model=model: -model.likelihood(x).log_prob(y).sum(),
            lambda model=model: model.likelihood(x),
            how,
            steps // 4,
        )
        networks[name] = [loss / len(x) for loss in losses]
    found: dict[str, Any] = {"mean-field Gaussian: steps to 1e-4 nats of the optimum": {}}
    for name, losses in gaussian.items():
        near = [step for step, loss in enumerate(losses) if loss < 1e-4]
        found["mean-field Gaussian: steps to 1e-4 nats of the optimum"][name] = near[0] if near else f"over {steps}"
    goal = min(min(losses) for name, losses in networks.items() if name != "natural gradient")
    key = f"diabetes: steps to the best loss that any Adam reaches in {steps // 4}"
    found[key] = {}
    for name, losses in networks.items():
        near = [step for step, loss in enumerate(losses) if loss <= goal]
        found[key][name] = near[0] if near else f"over {steps // 4}"
    found["diabetes: last training loss (nats per datum)"] = {name: losses[-1] for name, losses in networks.items()}
    made, axes = figure(1, 2, figsize=(10.5, 4))
    for name in METHODS:
        style = "-" if name == "natural gradient" else "--"
        axes[0].semilogy([max(loss, 1e-9) for loss in gaussian[name]], style, label=name)
        axes[1].plot(networks[name], style, label=name)
    axes[0].set(title="mean-field Gaussian, known optimum", xlabel="step", ylabel="KL above the optimum (nats)")
    top = networks["natural gradient"][0]
    axes[1].set(title="heteroscedastic regression, diabetes", xlabel="step", ylabel="−log p(y given x), nats per datum")
    axes[1].set_ylim(min(networks["natural gradient"]) - 0.1, top + 0.1)
    axes[0].legend(fontsize=8)
    save(made, run.plots / "natural_gradient.png")
    return found


METHODS = {"natural gradient": None, "Adam, lr 0.03": 0.03, "Adam, lr 0.1": 0.1, "Adam, lr 0.3": 0.3}


def mean_field():
    """Parameters of a diagonal Normal, its KL above the best to a badly scaled and correlated target, and itself."""
    import torch
    from torch.distributions import MultivariateNormal, Normal, kl_divergence

    precision = torch.diag(torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64))
    precision[0, 1] = precision[1, 0] = 5.0
    target = MultivariateNormal(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), precision_matrix=precision)
    best = -0.5 * (torch.logdet(precision) - precision.diagonal().log().sum())
    loc, log_scale = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss():
        return kl_divergence(MultivariateNormal(loc, scale_tril=torch.diag(log_scale.exp())), target) - best

    return [loc, log_scale], loss, lambda: Normal(loc, log_scale.exp())


def descend(parameters, loss: Callable, distributions: Callable, how: float | None, steps: int) -> list[float]:
    """The losses before each step and after the last: natural gradients, or Adam at a learning rate."""
    import torch

    from gumbo.inference import NaturalGradient

    if how is None:
        damping = 1e-8 if len(parameters) == 2 else 0.1
        optimizer: Any = NaturalGradient(parameters, lr=0.7, damping=damping, iterations=30, max_kl=1.0)
    else:
        optimizer = torch.optim.Adam(parameters, lr=how)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        losses.append(value.item())
        value.backward()
        optimizer.step(distributions) if how is None else optimizer.step()
    return [*losses, loss().item()]


# --- a reward to maximise: policy gradient, and a generator of token sequences


def policy(config: System, run: RunFolder) -> dict[str, Any]:
    """Policy gradients: point at the ink of a digit, paid or not; and write sequences of tokens that count."""
    import torch

    from gumbo.experiments.data import load
    from gumbo.experiments.plots import colours, figure, save
    from gumbo.guides import CategoricalGuide, LayeredGuide, UnconditionalGuide
    from gumbo.models import Expectation

    data = load("digits", binarize="static")
    steps = 30 if config.quick else 300
    pointing = Expectation((1, 8, 8), "bandit", family="categorical", shape=(64,))
    counting = Expectation((1,), "counting", family="categorical", shape=(10,), length=8)
    draws = torch.ones(64, 1)
    tasks = {
        "point at ink": (pointing, lambda: CategoricalGuide(pointing, hidden=(64,)), data.train, data.test),
        "point at ink, blind": (pointing, lambda: UnconditionalGuide(pointing), data.train, data.test),
        "count": (counting, lambda: LayeredGuide(counting, skip=False), draws, draws),
    }
    made, axes = figure(1, 3, figsize=(13, 4))
    found: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for axis, (task, (model, make, x, test)) in zip(axes, tasks.items(), strict=True):
        found[task] = {}
        for word, colour in colours(["score", "rloo"]).items():
            torch.manual_seed(config.seed)
            guide = make()
            rewards = climb(model, guide, word, x, steps)
            axis.plot(rewards, color=colour, label=word, linewidth=1)
            found[task][f"E[f] under {word}"] = reward_of(model, guide, test)
            trained[task] = guide
        axis.set(title=task, xlabel="step", ylabel="reward")
        axis.legend(fontsize=8)
    save(made, run.plots / "policy.png")
    with torch.no_grad():
        values = trained["count"](draws[:5])
    _clear_store()
    tokens = torch.stack([values[f"z{t}"].argmax(-1) for t in range(1, 9)], -1).tolist()
    found["sequences written"] = ", ".join("".join(map(str, row)) for row in tokens)
    return found


def climb(model, guide, word: str, x, steps: int) -> list[float]:
    """Maximise E[f] by one estimator; the mean reward of each step's draws."""
    import torch

    from gumbo.inference import SiteELBO

    loss = SiteELBO(word, kl_weight=0)(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    rewards = []
    for step in range(steps):
        start = step * 64 % max(1, len(x) - 63)
        optimizer.zero_grad()
        value = loss(x[start : start + 64])
        value.backward()
        optimizer.step()
        rewards.append(-value.item() / 64)
    return rewards


def reward_of(model, guide, x) -> float:
    import torch

    from gumbo.inference import SiteELBO

    with torch.no_grad():
        return -SiteELBO("rloo", kl_weight=0, num_particles=20)(model, guide)(x).item() / len(x)


# --- labels of a few images only


@dataclass(frozen=True)
class Recipe:
    """How the semi-supervised system trains: first on labelled images alone, so that the label means the class."""

    first: int
    epochs: int
    ramp: int = 2
    hidden: tuple[int, ...] = (256, 128)
    latent_dim: int = 5
    batch_size: int = 200
    lr: float = 3e-3
    alpha: float = 10.0
    temperature: float = 0.3


def semi_supervised(config: System, run: RunFolder) -> dict[str, Any]:
    """M2 with few labels under three estimators of the unseen label, against its classifier on those labels alone."""
    import statistics

    from gumbo.experiments.plots import colours, figure, save

    recipe = Recipe(first=8, epochs=config.epochs or 30)
    if config.quick:
        recipe = Recipe(first=3, epochs=config.epochs or 6, hidden=(64,), batch_size=100)
    seeds = (1 if config.quick else 3) if config.seeds is None else config.seeds
    if seeds < 1:
        raise BadInput(f"seeds must be at least 1, got {seeds}")
    (x, y), test = labelled_images(config)
    curves: dict[str, list[list[float]]] = {name: [] for name in LABELS}
    for seed in range(config.seed, config.seed + seeds):
        labelled, rest = choose_labelled(y, config.labels, seed)
        for name in LABELS:
            curve = learn_labels(name, x[labelled], y[labelled], x[rest], test, recipe, seed)
            print(f"{name}, seed {seed}: test accuracy {curve[-1]:.3f}", file=sys.stderr)
            curves[name].append(curve)
    found: dict[str, Any] = {"labelled": len(labelled), "unlabelled": len(rest), "tested on": len(test[1])}
    for name, of_seed in curves.items():
        last = [curve[-1] for curve in of_seed]
        found[name] = {"test accuracy": statistics.fmean(last)}
        found[name] |= {f"seed {config.seed + place}": accuracy for place, accuracy in enumerate(last)}
    made, axis = figure(figsize=(7, 4))
    for name, colour in colours(list(curves)).items():
        for place, curve in enumerate(curves[name]):
            axis.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=1, label=None if place else name)
    axis.axvline(recipe.first, color="black", linewidth=0.8, linestyle=":", label="unlabelled images join")
    axis.set(title=f"{len(labelled)} labels, {len(rest)} images without", xlabel="epoch", ylabel="test accuracy")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)
    save(made, run.plots / "semi_supervised.png")
    return found


# The classifier on labelled images alone, and how the unseen label of M2 gets its gradient.
LABELS = ("supervised", "enumerate", "gumbel-softmax", "rloo")


def labelled_images(config: System):
    """Grey images to learn from and binary ones to test on, each with labels; of MNIST its test images, 8,000/2,000."""
    import torch

    from gumbo.experiments.data import load

    data = load("mnist-test" if config.data == "mnist" else config.data)
    if not data.labels:
        raise BadInput(f"semi-supervised needs labels, and {config.data} has none: try digits or mnist")
    x, y = torch.cat([data.train, data.valid]), torch.cat([data.labels["train"], data.labels["valid"]])
    test = torch.bernoulli(data.test, generator=torch.Generator().manual_seed(1))
    return (x, y), (test, data.labels["test"])


def choose_labelled(y, count: int, seed: int):
    """Places of ``count`` images to label, as many of each class, and of all the others."""
    import torch

    classes = y.unique()
    each, left = divmod(count, len(classes))
    if left or each < 1 or each > torch.bincount(y)[classes].min():
        raise BadInput(
            f"labels must be a multiple of {len(classes)}, the number of classes, that each class can give; got {count}"
        )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[y[order] == label][:each] for label in classes])
    others = torch.ones(len(y), dtype=torch.bool)
    others[chosen] = False
    return chosen, others.nonzero().squeeze(-1)


def learn_labels(name: str, x, y, unlabelled, test, recipe: Recipe, seed: int) -> list[float]:
    """Test accuracy of q(y | x) after each epoch, trained on the bounds and α times its cross-entropy."""
    import torch

    from gumbo.guides import LabelConditionalGuide
    from gumbo.inference import SiteELBO
    from gumbo.inference.estimators import GumbelSoftmax
    from gumbo.models import SemiSupervisedVAE

    torch.manual_seed(seed)
    model = SemiSupervisedVAE(x.shape[1:], int(y.max()) + 1, recipe.latent_dim, hidden=recipe.hidden, activation="relu")
    guide = LabelConditionalGuide(model)
    seen = SiteELBO()(model, guide)
    word = {"supervised": "enumerate", "gumbel-softmax": GumbelSoftmax(recipe.temperature)}.get(name, name)
    unseen = SiteELBO({"y": word, "z": "pathwise"}, num_particles=4 if name == "rloo" else None)(model, guide)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=recipe.lr)
    accuracy = []
    for epoch in range(recipe.epochs):
        weight = min(1.0, max(0, epoch + 1 - recipe.first) / recipe.ramp)
        for batch in torch.randperm(len(unlabelled)).split(recipe.batch_size):
            few = torch.randperm(len(x))[: recipe.batch_size // 4]
            few_x, few_y = torch.bernoulli(x[few]), y[few]
            loss = recipe.alpha * guide.classification_loss(few_x, few_y)
            if name != "supervised":
                loss = loss + seen(few_x, y=few_y) / len(few)
                if weight:
                    loss = loss + weight * unseen(torch.bernoulli(unlabelled[batch])) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append((guide.classify(test[0]).argmax(-1) == test[1]).float().mean().item())
    return accuracy


SYSTEMS: dict[str, Callable[[System, RunFolder], dict[str, Any]]] = {
    "manifold": manifold,
    "gumbel-max": gumbel_max,
    "covariance": covariance,
    "warm-up": warm_up,
    "regression": regression,
    "natural-gradient": natural_gradient,
    "policy": policy,
    "semi-supervised": semi_supervised,
}


def main(argv: Sequence[str] | None = None, prog: str = "gumbo system") -> None:
    run_command(System, system, argv, prog)


if __name__ == "__main__":
    main()

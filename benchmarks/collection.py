"""What the models of the second wave reach on their data: one study each, as a table and a picture.

    python benchmarks/collection.py topics [--seeds 3] [--scale 1.0]

Writes ``benchmarks/results/collection/STUDY.md`` and, where there is something to see, a picture beside it; the model's
page quotes the table (`python benchmarks/model_pages.py --keep-examples`). ``--scale 0.1`` takes a tenth of the epochs.
Runs on one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from _timing import RESULTS, machine

from gumbo.experiments.data import (
    CELL_LIBRARY,
    CELL_TYPES,
    cells_law,
    load,
    reuters_vocabulary,
)
from gumbo.guides import (
    CombinerGuide,
    GridPolicy,
    MeanFieldGuide,
    NoGuide,
    NormalGuide,
    VampGuide,
    VectorQuantizedGuide,
)
from gumbo.inference import Linear, SiteELBO, audit, evaluate, fit
from gumbo.models import (
    DeepMarkovModel,
    GaussianVAE,
    GridWorld,
    HiddenMarkovModel,
    LatentDirichletAllocation,
    NegativeBinomialVAE,
    ProdLDA,
    VectorQuantizedVAE,
    npmi,
    perplexity,
    top_words,
)
from gumbo.tables import markdown

FOLDER = RESULTS / "collection"


def several(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard error over seeds."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    if len(numbers) < 2:
        return f"{numbers.item():.{digits}f}"
    return f"{numbers.mean():.{digits}f} ± {numbers.std() / math.sqrt(len(numbers)):.{digits}f}"


class Columns:
    """The numbers of one row of a table, by column, one number for each seed."""

    def __init__(self):
        self.numbers: dict[str, list[float]] = {}

    def add(self, **numbers: float) -> None:
        for name, number in numbers.items():
            self.numbers.setdefault(name, []).append(float(number))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the ``seconds`` that the block takes."""
        start = time.perf_counter()
        yield
        self.add(seconds=time.perf_counter() - start)

    def cells(self, *names: str, digits: int = 2) -> list[str]:
        return [several(self.numbers[name], digits) for name in names]


def seeded(seeds: int) -> Iterator[int]:
    """Each seed, set."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        yield seed


def scaled(epochs: int, scale: float) -> int:
    return max(1, round(epochs * scale))


def binarized_images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of binarized MNIST 10,000 images to train on, 1,000 to choose the epoch by, and 1,000 of the test split."""
    data = load("binarized-mnist")
    chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:1_000]
    return data.train[:10_000], data.valid[:1_000], data.test[chosen]


def topics(seeds: int, scale: float) -> list[str]:
    """Test perplexity with its bound's gap, coherence and topics of news."""
    data, words = load("reuters"), reuters_vocabulary()
    train, test = data.train.squeeze(1), data.test.squeeze(1)
    shares = (train.sum(0) + 0.1) / (train.sum(0) + 0.1).sum()
    unigram = math.exp(-(test * shares.log()).sum() / test.sum())
    rows, lists = [["one topic (unigram)", f"{unigram:.0f}", "", "", "", ""]], []
    kinds = {
        "LatentDirichletAllocation": (LatentDirichletAllocation, MeanFieldGuide, {}),
        "ProdLDA": (ProdLDA, NormalGuide, {}),
        "ProdLDA, normalize": (ProdLDA, NormalGuide, {"normalize": True}),
    }
    for name, (make, guide_of, options) in kinds.items():
        found = Columns()
        for seed in seeded(seeds):
            model = make((len(words),), num_topics=20, hidden=(64,), **options)
            guide = guide_of(model)
            start = time.perf_counter()
            fitted = fit(
                model, guide, train, valid=data.valid.squeeze(1), loss=SiteELBO("pathwise"), lr=1e-2, batch_size=50,
                epochs=scaled(200, scale), seed=seed, restore_best=True, progress=False,
            )  # fmt: skip
            found.add(seconds=time.perf_counter() - start)
            found.add(epoch=float(fitted.best_epoch))
            judged = evaluate(model, guide, test, num_samples=200)
            found.add(elbo=perplexity(judged.values["elbo"], test))
            found.add(evidence=perplexity(judged.values["log_evidence"], test))
            found.add(npmi=npmi(model.topics(), train).mean().item())
        rows.append([name, *found.cells("elbo", "evidence", digits=0), *found.cells("npmi", digits=3)])
        rows[-1] += [*found.cells("epoch", digits=0), *found.cells("seconds", digits=0)]
        best = npmi(model.topics(), train).topk(5).indices
        lists += ["", f"Five of the 20 topics of {name} (the most coherent, last seed):", ""]
        lists += [f"- {', '.join(one)}" for one in top_words(model.topics()[best], words, 8)]
    return [
        "Reuters, 300 news to train on, 45 to choose the epoch by, 50 to test; 20 topics, 4,258 words. Perplexity",
        "per word: an upper bound by the ELBO, and by 200 importance-weighted draws a document; NPMI of the ten first",
        f"words of each topic in the training news; mean ± standard error over {seeds} seeds ({machine()}).",
        "",
        *markdown(["model", "perplexity, ELBO", "perplexity, 200 draws", "NPMI", "best epoch", "seconds"], rows),
        *lists,
    ]


def cells(seeds: int, scale: float) -> list[str]:
    """Counts of cells of known law: the bound beside the truth, and how the counts are calibrated."""
    data = load("cells")
    train, valid, test = (part.squeeze(1) for part in (data.train, data.valid, data.test))
    truth = true_evidence(test)
    rows = [["truth", "", f"{truth.mean():.2f}", f"{(test == 0).float().mean():.3f}", "0.90", ""]]
    for inflated in (False, True):
        found = Columns()
        for seed in seeded(seeds):
            model = NegativeBinomialVAE(
                (60,), latent_dim=2, library="latent", library_loc=CELL_LIBRARY[0], library_sd=CELL_LIBRARY[1],
                zero_inflation=inflated, hidden=(64,),
            )  # fmt: skip
            guide = MeanFieldGuide(model, hidden=(64,))
            with found.timed():
                fit(
                    model, guide, train, valid=valid, loss=SiteELBO("pathwise"), lr=3e-3, batch_size=100,
                    epochs=scaled(150, scale), seed=seed, restore_best=True, progress=False,
                )  # fmt: skip
            judged = evaluate(model, guide, test, num_samples=200)
            found.add(elbo=judged.elbo, evidence=judged.log_evidence)
            with torch.no_grad():
                drawn = torch.stack([model.likelihood(**unpack(guide(test))).sample() for _ in range(100)])
            found.add(zeros=(drawn == 0).float().mean().item())
            low, high = drawn.quantile(0.05, dim=0), drawn.quantile(0.95, dim=0)
            found.add(inside=((test >= low) & (test <= high)).float().mean().item())
        name = "zero-inflated" if inflated else "negative binomial"
        rows.append([name, *found.cells("elbo", "evidence"), *found.cells("zeros", digits=3)])
        rows[-1] += [*found.cells("inside"), *found.cells("seconds", digits=0)]
        if not inflated:
            latent_picture(FOLDER / "cells.png", guide, test, data.labels["test"])
    return [
        "1,500 cells of 5 types to train on, 1,000 to test; 2 latent dimensions and a latent library. Nats per cell;",
        "the truth lists the types and integrates over the library. The share of zeros, and of the counts within the",
        "5 % and 95 % quantiles of 100 draws of p(x | z) at draws of the guide (counts are whole, so that a calibrated",
        f"share lies above 0.90); mean ± standard error over {seeds} seeds ({machine()}).",
        "",
        *markdown(["model", "ELBO", "log p(x)", "zeros", "within 90 %", "seconds"], rows),
        "",
        "![means of q(z given x) of the test cells, by type](../../benchmarks/results/collection/cells.png)",
    ]


def unpack(drawn: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"z": drawn["z"], "library": drawn["library"]}


def true_evidence(x: torch.Tensor) -> torch.Tensor:
    """log p(x) of cells under the law that they were drawn from, ``(N,)``."""
    shares, totals = (torch.from_numpy(part) for part in cells_law())
    noise = torch.linspace(-6, 6, 601, dtype=torch.float64)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(noise) + math.log(noise[1] - noise[0])
    library = (CELL_LIBRARY[0] + CELL_LIBRARY[1] * noise).exp()
    found = []
    for kind in range(CELL_TYPES):
        mean = library[:, None] * shares[kind]
        law = torch.distributions.NegativeBinomial(totals, logits=mean.log() - totals.log(), validate_args=False)
        by_library = torch.stack([law.log_prob(row).sum(-1) for row in x.double()])
        found.append((by_library + weight).logsumexp(-1) - math.log(CELL_TYPES))
    return torch.stack(found).logsumexp(0)


def latent_picture(path: Path, guide, x: torch.Tensor, labels: torch.Tensor) -> None:
    """Means of q(z | x) of two dimensions, coloured by label."""
    from gumbo.pictures import figure, save

    with torch.no_grad():
        features = guide.features(x, {})
        means = guide.distribution(guide.latents["z"], guide.encoder_heads["z"](features)).mean.numpy()
    made, axes = figure(figsize=(4.5, 4))
    for kind in np.unique(labels.numpy()):
        chosen = means[labels.numpy() == kind]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=6, label=f"type {kind}")
    axes.set_xlabel("z₁")
    axes.set_ylabel("z₂")
    axes.legend(fontsize=8, frameon=False)
    save(made, path)


def chorales(seeds: int, scale: float) -> list[str]:
    """Nats per time step of Bach's chorales under deep Markov models, by the ELBO and by importance weights."""
    data = load("jsb-chorales")
    longest = int(data.labels["train"].max())
    epochs = scaled(1000, scale)
    rows, curves = [], {}
    for flows in (0, 2):
        found = Columns()
        for seed in seeded(seeds):
            sizes = {"latent_dim": 50, "hidden": (100, 100), "transition_hidden": 100}
            model = DeepMarkovModel((1, longest, 88), **sizes)
            guide = CombinerGuide(model, rnn_hidden=200, flows=flows)
            whole = DeepMarkovModel(data.data_shape, **sizes)  # the same networks, over as many steps as any split has
            reads = CombinerGuide(whole, rnn_hidden=200, flows=flows)
            with found.timed():
                fitted = fit(
                    model, guide, model.inputs(data.train[:, :, :longest], data.labels["train"]),
                    loss=SiteELBO("pathwise", kl_weight=Linear(1000)), lr=3e-3, clip_norm=10.0, batch_size=20,
                    epochs=epochs, seed=seed, progress=False,
                )  # fmt: skip
            found.add(steps=float(len(fitted.history) * math.ceil(len(data.train) / 20)))
            whole.load_state_dict(model.state_dict())
            reads.load_state_dict(guide.state_dict())
            given = whole.inputs(data.test, data.labels["test"])
            judged = evaluate(whole, reads, given, num_samples=20, batch_size=77)
            found.add(elbo=-whole.per_step(judged.values["elbo"], given["mask"]))
            found.add(evidence=-whole.per_step(judged.values["log_evidence"], given["mask"]))
            curves[f"{flows} couplings" if flows else "no flow"] = [one["elbo"] for one in fitted.history]
        name = f"combiner, {flows} couplings" if flows else "combiner"
        rows.append([name, *found.cells("elbo", "evidence")])
        rows[-1] += found.cells("steps", "seconds", digits=0)
    curve_picture(FOLDER / "chorales.png", curves)
    return [
        "The standard split: 229 chorales to train on, 77 to test, of 25 to 160 steps of 88 keys. Nats per time step",
        "of the test split, by the ELBO and by 20 importance-weighted draws a chorale (lower is better; each an upper",
        f"bound of the truth), mean ± standard error over {seeds} seeds ({machine()}). Latent dimension 50, transition",
        "100, emission 100, GRU 200. Published, after 5,000 epochs of a larger network: 6.87 without flows and 6.82",
        "and 6.80 with one and two inverse autoregressive flows (Pyro's tutorial), 6.93 (Krishnan et al. 2017).",
        "",
        *markdown(["guide", "ELBO", "20 draws", "steps", "seconds"], rows),
        "",
        "![the training objective by epoch](../../benchmarks/results/collection/chorales.png)",
    ]


def curve_picture(path: Path, curves: dict[str, list[float]]) -> None:
    """One line a name, by epoch."""
    from gumbo.pictures import figure, save

    made, axes = figure(figsize=(5, 3.2))
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per chorale")
    axes.legend(fontsize=8, frameon=False)
    save(made, path)


def priors(seeds: int, scale: float) -> list[str]:
    """Binarized MNIST under N(0, I), a mixture, a VampPrior and a flow."""
    train, valid, test = binarized_images()
    options = {"mixture": {"components": 100}, "vamp": {"components": 100}, "flow": {"transforms": 3}}
    rows = []
    for prior in ("standard", "mixture", "vamp", "flow"):
        found = Columns()
        for seed in seeded(seeds):
            model = GaussianVAE(
                (1, 28, 28), latent_dim=20, hidden=(200, 200), prior=prior, prior_options=options.get(prior)
            )
            guide = VampGuide(model) if prior == "vamp" else NormalGuide(model)
            with found.timed():
                fit(
                    model, guide, train, valid=valid, loss=SiteELBO("pathwise", kl_weight=Linear(1000)), lr=1e-3,
                    batch_size=100, epochs=scaled(100, scale), seed=seed, restore_best=True, progress=False,
                )  # fmt: skip
            judged = evaluate(model, guide, test, num_samples=100)
            found.add(elbo=judged.elbo, evidence=judged.log_evidence, rate=judged.rate)
        rows.append([prior, *found.cells("elbo", "evidence", "rate")])
        rows[-1] += found.cells("seconds", digits=0)
    return [
        "Binarized MNIST: 10,000 of the training images, 1,000 to choose the epoch by, 1,000 test images drawn at",
        f"random; 20 latents, layers of 200, {scaled(100, scale)} epochs. Nats per image, log p(x) by 100",
        f"draws, mean ± standard error over {seeds} seeds ({machine()}). Published, on all of the training images with",
        "other networks (reproductions, in brackets the papers' values): −89.78 (−89.9) with a standard prior, −85.79",
        "(−85.57) with a VampPrior. What is to be compared is the order.",
        "",
        *markdown(["prior", "ELBO", "log p(x)", "rate", "seconds"], rows),
    ]


def codes(seeds: int, scale: float) -> list[str]:
    """Codebook use and bits per pixel of vector-quantized codes; the bias of straight-through beside enumeration."""
    train, valid, test = binarized_images()
    rows = []
    for prior in ("uniform", "independent", "autoregressive"):
        found = Columns()
        for seed in seeded(seeds):
            model = VectorQuantizedVAE((1, 28, 28), num_codes=8, num_classes=32, prior=prior, hidden=(200, 200))
            guide = VectorQuantizedGuide(model)
            with found.timed():
                fit(
                    model, guide, train, valid=valid, loss=SiteELBO("rloo", num_particles=4), lr=1e-3, batch_size=100,
                    epochs=scaled(50, scale), seed=seed, restore_best=True, progress=False,
                )  # fmt: skip
            judged = evaluate(model, guide, test, num_samples=50)
            with torch.no_grad():
                use = model.code_use(guide(test)["y"])
            found.add(elbo=judged.elbo)
            found.add(bits=-judged.log_evidence / 784 / math.log(2))
            found.add(**use)
        rows.append([prior, *found.cells("elbo"), *found.cells("bits", digits=4), *found.cells("used")])
        rows[-1] += [*found.cells("perplexity", digits=1), *found.cells("seconds", digits=0)]
    torch.manual_seed(0)
    model = VectorQuantizedVAE((1, 28, 28), num_codes=2, num_classes=4, hidden=(50,))
    guide = VectorQuantizedGuide(model)
    report = audit(model, guide, test[:20], estimators=["straight-through", "gumbel-softmax", "rloo"], num_samples=400)
    return [
        "Binarized MNIST: 10,000 of the training images, 1,000 test images drawn at random; 8 positions of 32 codes,",
        f"{scaled(50, scale)} epochs with `rloo` and four draws. ELBO in nats per image, bits per pixel by 50",
        f"importance-weighted draws, mean ± standard error over {seeds} seeds ({machine()}).",
        "",
        *markdown(["prior", "ELBO", "bits per pixel", "codes used", "their perplexity", "seconds"], rows),
        "",
        "The gradient against the exact one by enumeration, at a fresh model of 2 positions of 4 codes, 20 images:",
        "",
        "```",
        str(report),
        "```",
    ]


def grid(seeds: int, scale: float) -> list[str]:
    """The policy gradient of a walker: variance beside the exact gradient, and the return that training reaches."""
    model = GridWorld(height=4, width=4, steps=10)
    rows = []
    for word in ("score", "score-average", "rloo"):
        found = Columns()
        for _ in seeded(seeds):
            guide = GridPolicy(model)
            loss = SiteELBO(word, kl_weight=0, num_particles=4)(model, guide)
            walks = torch.ones(8, 1)
            exact = torch.autograd.grad(-model.expected_return(guide.encoder_logits), guide.encoder_logits)[0]
            draws = [torch.autograd.grad(loss(walks) / 8, guide.encoder_logits)[0] for _ in range(100)]
            spread = torch.stack(draws) - exact
            found.add(variance=spread.square().mean(0).sum().item() / exact.square().sum().item())
            optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
            reached = math.nan
            total = scaled(400, scale)
            for step in range(1, total + 1):
                optimizer.zero_grad()
                (loss(walks) / 8).backward()
                optimizer.step()
                if math.isnan(reached) and model.expected_return(guide.encoder_logits) > model.optimum() - 0.5:
                    reached = step
            found.add(total=model.expected_return(guide.encoder_logits).item())
            found.add(steps=reached)
        rows.append([f"`{word}`", *found.cells("variance", "total")])
        rows[-1] += found.cells("steps", digits=0)
    return [
        f"4 × 4 cells, 10 steps; 8 walks and 4 draws of each a step, {scaled(400, scale)} steps of Adam at",
        "0.1. The mean squared error of the gradient of a uniform policy over the squared length of the exact one, by",
        f"forward marginals; the return reached, of which the best is {model.optimum():.2f}; steps to within 0.5",
        f"of it; mean ± standard error over {seeds} seeds.",
        "",
        *markdown(["estimator", "relative error of the gradient", "return", "steps to optimum − 0.5"], rows),
    ]


def hidden(seeds: int, scale: float) -> list[str]:
    """Nats per time step of Bach's chorales under hidden Markov models, exactly."""
    data = load("jsb-chorales")
    longest = int(data.labels["train"].max())
    rows = []
    for kind, states in (("plain", 16), ("autoregressive", 16), ("factorial", 4)):
        found = Columns()
        for seed in seeded(seeds):
            model = HiddenMarkovModel((1, longest, 88), num_states=states, kind=kind)
            whole = HiddenMarkovModel(data.data_shape, num_states=states, kind=kind)
            with found.timed():
                given = model.inputs(data.train[:, :, :longest], data.labels["train"])
                fitted = fit(
                    model, NoGuide(model), given, loss=SiteELBO(), lr=5e-2, batch_size=len(data.train),
                    epochs=scaled(200, scale), seed=seed, progress=False,
                )  # fmt: skip
            found.add(steps=float(len(fitted.history)))
            whole.load_state_dict(model.state_dict())
            for split in ("train", "test"):
                batch = whole.inputs(getattr(data, split), data.labels[split])
                with torch.no_grad():
                    total = SiteELBO()(whole, NoGuide(whole))(**batch)
                found.add(**{split: (total / batch["mask"].sum()).item()})
        size = sum(parameter.numel() for parameter in model.parameters())
        rows.append([f"{kind}, {states} states", f"{size:,}", *found.cells("train", "test")])
        rows[-1] += found.cells("steps", "seconds", digits=0)
    return [
        "The standard split of the chorales; exact nats per time step (lower is better), states summed out by",
        f"`SiteELBO`, Adam on all of the training data at once, mean ± standard error over {seeds} seeds",
        f"({machine()}).",
        "",
        *markdown(["model", "parameters", "train", "test", "steps", "seconds"], rows),
    ]


STUDIES: dict[str, Callable[[int, float], list[str]]] = {
    study.__name__: study for study in (topics, cells, chorales, priors, codes, grid, hidden)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the epochs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in given.studies:
        options = f" --seeds {given.seeds}" + (f" --scale {given.scale:g}" if given.scale != 1 else "")
        lines = [f"`python benchmarks/collection.py {name}{options}`:", "", *STUDIES[name](given.seeds, given.scale)]
        (FOLDER / f"{name}.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()

"""What the models of the second wave reach on their data: one study each, as a table and a picture.

    python benchmarks/collection.py topics [--seeds 3] [--scale 1.0]

Writes ``benchmarks/results/collection/STUDY.md`` and, where there is something to see, a picture beside it; the model's
page quotes the table (`python benchmarks/model_pages.py --keep-examples`). ``--scale 0.1`` takes a tenth of the epochs.
Runs on one thread; `seconds` are of the processor.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _pyro_chains import chains
from _timing import RESULTS, machine
from pyro.infer import TraceEnum_ELBO
from pyro.optim import ClippedAdam

from gumbo.experiments.data import (
    CELL_LIBRARY,
    CELL_TYPES,
    cells_law,
    load,
    reuters_vocabulary,
    spelled,
    switching_law,
    switching_regimes,
)
from gumbo.guides import (
    CombinerGuide,
    GridPolicy,
    LayeredGuide,
    MeanFieldGuide,
    NoGuide,
    NormalGuide,
    RecurrentAttentionGuide,
    TokenPolicy,
    VampGuide,
    VectorQuantizedGuide,
)
from gumbo.inference import Linear, SiteELBO, Step, audit, evaluate, fit, to_arviz
from gumbo.models import (
    AttendInferRepeat,
    DeepMarkovModel,
    GaussianVAE,
    GridWorld,
    HiddenMarkovModel,
    LatentDirichletAllocation,
    NegativeBinomialVAE,
    PoissonDEF,
    PoissonVAE,
    ProdLDA,
    SequenceVAE,
    SwitchingStateSpace,
    VectorQuantizedVAE,
    models,
    npmi,
    perplexity,
    top_words,
)
from gumbo.tables import markdown

FOLDER = RESULTS / "collection"
UNFINISHED = Path(tempfile.gettempdir()) / "gumbo-collection"  # runs that take hours go on from here


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
        """Add the ``seconds`` of the processor that the block takes, whatever else the machine does."""
        start = time.process_time()
        yield
        self.add(seconds=time.process_time() - start)

    def cells(self, *names: str, digits: int = 2) -> list[str]:
        return [several(self.numbers[name], digits) for name in names]


def counted(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


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


def news() -> tuple[torch.Tensor, ...]:
    """Word counts of Reuters: the splits ``(N, V)``."""
    data = load("reuters")
    return tuple(split.squeeze(1) for split in (data.train, data.valid, data.test))


def one_topic(train: torch.Tensor, test: torch.Tensor) -> float:
    """The perplexity per word of the shares of words in the training news."""
    shares = (train.sum(0) + 0.1) / (train.sum(0) + 0.1).sum()
    return math.exp(-(test * shares.log()).sum() / test.sum())


def topics(seeds: int, scale: float) -> list[str]:
    """Test perplexity with its bound's gap, coherence and topics of news."""
    words, (train, valid, test) = reuters_vocabulary(), news()
    rows, lists = [["one topic (unigram)", f"{one_topic(train, test):.0f}", "", "", "", ""]], []
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
            start = time.process_time()
            fitted = fit(
                model, guide, train, valid=valid, loss=SiteELBO("pathwise"), lr=1e-2, batch_size=50,
                epochs=scaled(200, scale), seed=seed, restore_best=True, progress=False,
            )  # fmt: skip
            found.add(seconds=time.process_time() - start)
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
        f"words of each topic in the training news; mean ± standard error over {counted(seeds)} ({machine()}).",
        "",
        *markdown(["model", "perplexity, ELBO", "perplexity, 200 draws", "NPMI", "best epoch", "seconds"], rows),
        *lists,
    ]


def deep_topics(seeds: int, scale: float) -> list[str]:
    """Test perplexity, coherence and topics of news under layers of Gammas and of Poisson counts."""
    words, (train, valid, test) = reuters_vocabulary(), news()
    rows, lists = [["", "one topic (unigram)", "", f"{one_topic(train, test):.0f}", "", "", "", ""]], []
    for kind, word, particles, lr in DEEP_TOPICS:
        found = Columns()
        for seed in seeded(seeds):
            model = PoissonDEF((len(words),), layers=(20, 5), kind=kind)
            guide = LayeredGuide(model)
            with found.timed():
                fitted = fit(
                    model, guide, train, valid=valid, lr=lr, clip_norm=100.0, batch_size=50,
                    loss=SiteELBO(word, num_particles=particles, kl_weight=Linear(scaled(300, scale))),
                    epochs=scaled(200, scale), seed=seed, restore_best=True, progress=False,
                )  # fmt: skip
            found.add(epoch=float(fitted.best_epoch))
            judged, lengths = evaluate(model, guide, test, num_samples=200), log_lengths(model, test)
            found.add(elbo=perplexity(judged.values["elbo"] - lengths, test))
            found.add(evidence=perplexity(judged.values["log_evidence"] - lengths, test))
            found.add(npmi=npmi(model.topics(), train).mean().item())
        rows.append([kind, f"`{word}`", f"{lr:g}", *found.cells("elbo", "evidence", digits=0)])
        rows[-1] += found.cells("npmi", digits=3)
        rows[-1] += [*found.cells("epoch", digits=0), *found.cells("seconds", digits=0)]
        best = npmi(model.topics(), train).topk(5).indices
        lists += ["", f"Five of the 20 topics of the {kind} layers under `{word}` (the most coherent, last seed):", ""]
        lists += [f"- {', '.join(one)}" for one in top_words(model.topics()[best], words, 8)]
    return [
        "Reuters, 300 news to train on, 45 to choose the epoch by, 50 to test; layers of 20 and 5, 4,258 words.",
        "Perplexity per word given a document's length, whose log-probability, by 20,000 draws of the prior, is",
        "subtracted: by the ELBO, and by 200 importance-weighted draws a document; NPMI of the ten first words of each",
        f"topic in the training news; mean ± standard error over {counted(seeds)} ({machine()}).",
        "`rloo` and `score-average` have four draws; the rate is Adam's.",
        "",
        *markdown(
            ["layers", "estimator", "rate", "perplexity, ELBO", "200 draws", "NPMI", "best epoch", "seconds"], rows
        ),
        *lists,
    ]


# The kind of layers, the estimator of both, its particles, and Adam's rate: at 1e-2 the two without a baseline from
# other draws diverge.
DEEP_TOPICS = [
    ("gamma", "pathwise", None, 1e-2),
    ("poisson", "score-average", 4, 3e-3),
    ("poisson", "nvil", None, 3e-3),
    ("poisson", "rloo", 4, 1e-2),
    ("poisson", "fini", None, 1e-2),
]


@torch.no_grad()
def log_lengths(model: PoissonDEF, counts: torch.Tensor, draws: int = 20_000) -> torch.Tensor:
    """log p of each document's length under the model, ``(N,)``: a sum of independent Poisson counts is one."""
    drawn = model.sample_prior(draws)
    rates = model.likelihood(drawn["z1"]).base_dist.rate.flatten(1).sum(-1)
    lengths = counts.flatten(1).sum(-1, keepdim=True)
    return torch.distributions.Poisson(rates).log_prob(lengths).logsumexp(-1) - math.log(draws)


def spikes(seeds: int, scale: float) -> list[str]:
    """What a VAE with counts as latents reaches on binarized MNIST, by estimator and by family."""
    train, valid, test = binarized_images()
    rows = []
    for counts, word, particles in SPIKES:
        found = Columns()
        for seed in seeded(seeds):
            model = PoissonVAE(train.shape[1:], num_latents=50, counts=counts)
            guide = MeanFieldGuide(model)
            with found.timed():
                fitted = fit(
                    model, guide, train, valid=valid, loss=SiteELBO(word, num_particles=particles), lr=1e-3,
                    batch_size=100, epochs=scaled(40, scale), seed=seed, restore_best=True, progress=False,
                )  # fmt: skip
            judged = evaluate(model, guide, test, num_samples=100)
            found.add(elbo=judged.elbo, evidence=judged.log_evidence, rate=judged.rate, epoch=float(fitted.best_epoch))
        rows.append([counts, f"`{word}`", *found.cells("elbo", "evidence", "rate")])
        rows[-1] += [*found.cells("epoch", digits=0), *found.cells("seconds", digits=0)]
    return [
        "Binarized MNIST: 10,000 of the training images, 1,000 to choose the epoch by, 1,000 test images drawn at",
        f"random; 50 latents, layers of 200, {scaled(40, scale)} epochs of Adam at 1e-3. Nats per image, log p(x) by",
        f"100 importance-weighted draws; mean ± standard error over {counted(seeds)} ({machine()}).",
        "`rloo` and `score-average` have four draws.",
        "",
        *markdown(["latents", "estimator", "ELBO", "log p(x)", "rate", "best epoch", "seconds"], rows),
    ]


# The family of the latents, the estimator, and its particles.
SPIKES = [
    ("poisson", "score-average", 4),
    ("poisson", "nvil", None),
    ("poisson", "rloo", 4),
    ("poisson", "fini", None),
    ("negative-binomial", "rloo", 4),
    ("binomial", "rloo", 4),
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
        f"share lies above 0.90); mean ± standard error over {counted(seeds)} ({machine()}).",
        "",
        *markdown(["model", "ELBO", "log p(x)", "zeros", "within 90 %", "seconds"], rows),
        "",
        "![means of q(z given x) of the test cells, by type](cells.png)",
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
    """Means of q(z | x) of two dimensions, colored by label."""
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
    """Nats per time step of Bach's chorales under a deep Markov model, by the ELBO and by importance weights."""
    return deep_markov(seeds, scale, flows=0)


def chorales_couplings(seeds: int, scale: float) -> list[str]:
    """The same with couplings in the guide."""
    return deep_markov(seeds, scale, flows=2)


def deep_markov(seeds: int, scale: float, flows: int) -> list[str]:
    """The study of chorales with that many couplings; each look is printed, since a run takes hours."""
    data = load("jsb-chorales")
    longest = int(data.labels["train"].max())
    epochs, tenth, every = scaled(5000, scale), scaled(4000, scale), max(1, min(50, scaled(4000, scale) // 10))
    batches = math.ceil(len(data.train) / 20)
    name = f"combiner, {flows} couplings" if flows else "combiner"
    found, curves = Columns(), {}
    for seed in seeded(seeds):
        sizes = {"latent_dim": 100, "hidden": (100, 100), "transition_hidden": 200}
        model = DeepMarkovModel((1, longest, 88), **sizes)
        guide = CombinerGuide(model, rnn_hidden=300, flows=flows)
        whole = DeepMarkovModel(data.data_shape, **sizes)  # the same networks, over as many steps as any split has
        run = UNFINISHED / f"chorales-{flows}-{seed}-{epochs}"  # three core-hours, which may be cut
        watch = Watching((model, guide), (whole, CombinerGuide(whole, rnn_hidden=300, flows=flows)), data, every, run)
        lrd = 0.1 ** (1 / (tenth * batches))
        adam = {"lr": 1e-3, "betas": (0.96, 0.999), "clip_norm": 10.0, "lrd": lrd, "weight_decay": 2.0}
        fit(
            model, guide, model.inputs(data.train[:, :, :longest], data.labels["train"]),
            loss=SiteELBO("pathwise", kl_weight=Linear(max(1, tenth * batches // 5), start=0.2)),
            optimizer=ClippedAdam(adam), batch_size=20, epochs=epochs, seed=seed, progress=False, on_epoch=watch,
            run_dir=run, resume=(run / "checkpoints").exists(), checkpoint_every=every, compile=True,
        )  # fmt: skip
        found.add(seconds=watch.seconds)
        elbo, evidence = watch.judged("test", draws=20)
        found.add(elbo=elbo, evidence=evidence)
        watch.load_best()
        elbo, evidence = watch.judged("test", draws=20)
        found.add(best_elbo=elbo, best=evidence, epoch=watch.best_epoch)
        curves |= {f"{split}, seed {seed}" if seeds > 1 else split: curve for split, curve in watch.curves.items()}
    picture = f"chorales-{flows}-couplings.png" if flows else "chorales.png"
    curve_picture(FOLDER / picture, curves, y="nats per time step", first=every, every=every)
    heads = ["guide", "ELBO", "20 draws", "best epoch", "ELBO there", "20 draws there", "steps", "seconds"]
    row = [
        name,
        *found.cells("elbo", "evidence"),
        *found.cells("epoch", digits=0),
        *found.cells("best_elbo", "best"),
        str(epochs * batches),
        *found.cells("seconds", digits=0),
    ]
    return [
        "The standard split: 229 chorales to train on, 76 to choose the epoch by, 77 to test, of 25 to 160 steps of 88",
        "keys. Nats per time step of the test split, by the ELBO and by 20 importance-weighted draws a chorale, at the",
        f"end and at the best of every {every} epochs by the bound of the validation split (lower is better; each an",
        f"upper bound of the truth), mean ± standard error over {counted(seeds)} ({machine()}).",
        "Latent dimension 100, transition 200, emission 100, GRU 300; optimizer and KL weight are those of Pyro's",
        "example (weight decay 2, elements of the gradient clipped at 10, 20 chorales a step), with a learning rate",
        f"from 1e-3 that falls tenfold in {tenth:,} of the {epochs:,} epochs, where Pyro's goes from 3e-4 to 3e-5 in",
        f"5,000, and the KL weight from 0.2 to 1 in {tenth // 5:,}. Published, by the ELBO of one draw, with a "
        "recurrent",
        "network of 600: 6.87 without flows, 6.82 and 6.80 with one and two inverse autoregressive flows (Pyro's",
        "tutorial); 6.93 (Krishnan et al. 2017).",
        "",
        *markdown(heads, [row]),
        "",
        f"![the bound of training and validation chorales by epoch]({picture})",
    ]


class Watching:
    """Nats per time step of chorales during training, for ``on_epoch``, and the parameters of the best epoch.

    What it has seen is kept in the run's folder, for a run that is resumed.

    Args:
        trained: model and guide.
        whole: the same networks, over as many steps as any split has.
        every: epochs between two looks.
        run: the folder.
    """

    def __init__(self, trained: tuple, whole: tuple, data: Any, every: int, run: Path):
        self.trained, self.whole, self.data, self.every, self.file = trained, whole, data, every, run / "looks.pt"
        self.curves: dict[str, list[float]] = {"training": [], "validation": []}
        self.best, self.best_epoch, self.seconds, self._kept = math.inf, 0, 0.0, []
        if self.file.exists():
            seen = torch.load(self.file)
            self.curves, self._kept = seen["curves"], seen["kept"]
            self.best, self.best_epoch, self.seconds = seen["best"], seen["best_epoch"], seen["seconds"]
        self.start = time.process_time() - self.seconds

    def __call__(self, numbers: dict[str, float]) -> None:
        epoch = int(numbers["epoch"])
        if epoch % self.every:
            return
        for split, name in (("train", "training"), ("valid", "validation")):
            # A run that was cut between a look and its checkpoint looks again.
            self.curves[name] = [*self.curves[name][: epoch // self.every - 1], self.judged(split)[0]]
        print(epoch, *(f"{name} {curve[-1]:.3f}" for name, curve in self.curves.items()), flush=True)
        if self.curves["validation"][-1] < self.best:
            self.best, self.best_epoch = self.curves["validation"][-1], epoch
            self._kept = [copy.deepcopy(part.state_dict()) for part in self.trained]
        self.seconds = time.process_time() - self.start
        seen = {"curves": self.curves, "kept": self._kept, "best": self.best, "best_epoch": self.best_epoch}
        torch.save(seen | {"seconds": self.seconds}, self.file)

    def load_best(self) -> None:
        for part, state in zip(self.trained, self._kept, strict=True):
            part.load_state_dict(state)

    def judged(self, split: str, draws: int = 1) -> tuple[float, float]:
        """Nats per time step by the ELBO and by importance-weighted draws."""
        for part, given in zip(self.whole, self.trained, strict=True):
            part.load_state_dict(given.state_dict())
        model, guide = self.whole
        batch = model.inputs(getattr(self.data, split), self.data.labels[split])
        judged = evaluate(model, guide, batch, num_samples=draws, batch_size=77)
        return tuple(-model.per_step(judged.values[one], batch["mask"]) for one in ("elbo", "log_evidence"))


def curve_picture(
    path: Path,
    curves: dict[str, list[float]],
    x: str = "epoch",
    y: str = "nats per chorale",
    first: int = 1,
    every: int = 1,
) -> None:
    """One line a name: of epochs from the ``first`` on, or of each ``every``-th step from 0."""
    from gumbo.pictures import figure, save

    made, axes = figure(figsize=(5, 3.2))
    for name, curve in curves.items():
        axes.plot([every * place + first for place in range(len(curve))], curve, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8, frameon=False)
    save(made, path)


def priors(seeds: int, scale: float) -> list[str]:
    """Binarized MNIST under N(0, I), a mixture, a VampPrior and a flow."""
    train, valid, test = binarized_images()
    options = {"mixture": {"components": 100}, "vamp": {"components": 100}, "flow": {"transforms": 3}}
    rows, curves, bounds = [], {}, {}
    for prior in ("standard", "mixture", "vamp", "flow"):
        found, lines = Columns(), []
        for seed in seeded(seeds):
            model = GaussianVAE(
                (1, 28, 28), latent_dim=20, hidden=(200, 200), prior=prior, prior_options=options.get(prior)
            )
            guide = VampGuide(model) if prior == "vamp" else NormalGuide(model)
            with found.timed():
                fitted = fit(
                    model, guide, train, valid=valid, valid_samples=2,
                    loss=SiteELBO("pathwise", kl_weight=Linear(scaled(1000, scale))), lr=1e-3,
                    batch_size=100, epochs=scaled(100, scale), seed=seed, restore_best=True, progress=False,
                )  # fmt: skip
            lines.append([one["valid_elbo"] for one in fitted.history])
            judged = evaluate(model, guide, test, num_samples=100)
            found.add(elbo=judged.elbo, evidence=judged.log_evidence, rate=judged.rate)
        bounds[prior] = found.numbers["elbo"]
        gain = [one - other for one, other in zip(bounds[prior], bounds["standard"], strict=True)]
        rows.append([prior, *found.cells("elbo", "evidence", "rate"), several(gain) if any(gain) else ""])
        rows[-1] += found.cells("seconds", digits=0)
        curves[prior] = [sum(values) / seeds for values in zip(*lines, strict=True)]
    curve_picture(
        FOLDER / "priors.png", {name: curve[5:] for name, curve in curves.items()}, y="nats per image", first=5
    )
    return [
        "Binarized MNIST: 10,000 of the training images, 1,000 to choose the epoch by, 1,000 test images drawn at",
        f"random; 20 latents, layers of 200, {scaled(100, scale)} epochs. Nats per image, log p(x) by 100",
        "draws, beside the ELBO its gain over the standard prior with the same seed; mean ± standard error over",
        f"{counted(seeds)} ({machine()}). Published, on all of the training images with",
        "other networks (reproductions, in brackets the papers' values): −89.78 (−89.9) with a standard prior, −85.79",
        "(−85.57) with a VampPrior. What is to be compared is the order. The autoregressive prior, of codes, is on the",
        "page of [VectorQuantizedVAE](../../../docs/models/vector-quantized-vae.md).",
        "",
        *markdown(["prior", "ELBO", "log p(x)", "rate", "gain of the ELBO", "seconds"], rows),
        "",
        "![ELBO of the validation images by epoch](priors.png)",
    ]


LATER = "autoregressive, fitted to uniform's codes"


def codes(seeds: int, scale: float) -> list[str]:
    """Codebook use and bits per pixel of vector-quantized codes; the bias of straight-through beside enumeration."""
    train, valid, test = binarized_images()
    rows, uniform = [], {}
    for prior in ("uniform", "independent", "autoregressive", LATER):
        found = Columns()
        for seed in seeded(seeds):
            kind = "autoregressive" if prior == LATER else prior
            model = VectorQuantizedVAE((1, 28, 28), num_codes=8, num_classes=32, prior=kind, hidden=(200, 200))
            guide, epochs = VectorQuantizedGuide(model), scaled(50, scale)
            if prior == LATER:
                learned, encoder = uniform[seed]
                model.load_state_dict(learned, strict=False)
                guide.load_state_dict(encoder)
                for part in (model, guide):
                    part.requires_grad_(False)
                model.decoder_prior.requires_grad_(True)
                epochs = scaled(10, scale)
            with found.timed():
                fit(
                    model, guide, train, valid=valid, loss=SiteELBO("rloo", num_particles=4), lr=1e-3, batch_size=100,
                    epochs=epochs, seed=seed, restore_best=True, progress=False,
                )  # fmt: skip
            if prior == "uniform":
                uniform[seed] = model.state_dict(), guide.state_dict()
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
        f"importance-weighted draws, mean ± standard error over {counted(seeds)} ({machine()}). In the last row, as in",
        f"the paper, an autoregressive prior is fitted to the codes of the first row for {scaled(10, scale)} epochs,",
        "and all else is frozen.",
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
    walks = torch.ones(8, 1)
    for word in ("score", "score-average", "rloo", "exact"):
        found = Columns()
        for _ in seeded(seeds):
            guide = GridPolicy(model)
            loss = None if word == "exact" else SiteELBO(word, kl_weight=0, num_particles=4)(model, guide)

            def minus_return(guide=guide, loss=loss) -> torch.Tensor:
                return -model.expected_return(guide.encoder_logits) if loss is None else loss(walks) / 8

            exact = torch.autograd.grad(-model.expected_return(guide.encoder_logits), guide.encoder_logits)[0]
            draws = [torch.autograd.grad(minus_return(), guide.encoder_logits)[0] for _ in range(100)]
            spread = torch.stack(draws) - exact
            found.add(variance=spread.square().mean(0).sum().item() / exact.square().sum().item())
            optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
            reached = math.nan
            total = scaled(400, scale)
            for step in range(1, total + 1):
                optimizer.zero_grad()
                minus_return().backward()
                optimizer.step()
                if math.isnan(reached) and model.expected_return(guide.encoder_logits) > model.optimum() - 0.5:
                    reached = step
            found.add(total=model.expected_return(guide.encoder_logits).item())
            found.add(steps=reached)
        name = "exact, by forward marginals" if word == "exact" else f"`{word}`"
        rows.append([name, *found.cells("variance", "total")])
        rows[-1] += found.cells("steps", digits=0)
    return [
        f"4 × 4 cells, 10 steps; 8 walks and 4 draws of each a step, {scaled(400, scale)} steps of Adam at",
        "0.1. The mean squared error of the gradient of a uniform policy over the squared length of the exact one, by",
        f"forward marginals, from 100 draws; the return reached, of which the best is {model.optimum():.2f}; steps to",
        f"within 0.5 of it; mean ± standard error over {counted(seeds)} ({machine()}).",
        "",
        *markdown(["estimator", "relative error of the gradient", "return", "steps to optimum − 0.5"], rows),
    ]


def hidden(seeds: int, scale: float) -> list[str]:
    """Nats per time step of Bach's chorales under hidden Markov models, exactly."""
    data = load("jsb-chorales")
    longest = int(data.labels["train"].max())
    kinds = {"plain": 16, "autoregressive": 16, "factorial": 4, "partially-factorial": 4}
    rows, curves = [], {}
    for kind, states in kinds.items():
        found = Columns()
        for seed in seeded(seeds):
            model = HiddenMarkovModel((1, longest, 88), num_states=states, kind=kind)
            whole = HiddenMarkovModel(data.data_shape, num_states=states, kind=kind)
            given = model.inputs(data.train[:, :, :longest], data.labels["train"])
            with found.timed():
                fitted = fit(
                    model, NoGuide(model), given, loss=SiteELBO(), lr=5e-2, batch_size=20,
                    epochs=scaled(100, scale), seed=seed, progress=False,
                )  # fmt: skip
            found.add(steps=float(len(fitted.history) * math.ceil(len(data.train) / 20)))
            whole.load_state_dict(model.state_dict())
            for split in ("train", "test"):
                batch = whole.inputs(getattr(data, split), data.labels[split])
                with torch.no_grad():
                    total = SiteELBO()(whole, NoGuide(whole))(**batch)
                found.add(**{split: (total / batch["mask"].sum()).item()})
            few = {name: value[:20] for name, value in given.items()}
            found.add(**beside_pyro(model, few, few["mask"].sum().item()))
        by_step = len(given["mask"]) / given["mask"].sum().item()
        curves[kind] = [-one["elbo"] * by_step for one in fitted.history]
        size = sum(parameter.numel() for parameter in model.parameters())
        rows.append([f"{kind}, {states} states", f"{size:,}", *found.cells("train", "test")])
        rows[-1] += [*found.cells("steps", "seconds", digits=0), f"{max(found.numbers['gap']):.0e}"]
        rows[-1] += [f"{max(found.numbers['slope']):.0e}", *found.cells("ratio")]
    curve_picture(FOLDER / "hidden.png", curves, y="nats per time step")
    return [
        "The standard split of the chorales; exact nats per time step (lower is better), states summed out by",
        f"`SiteELBO`, Adam at 0.05 on 20 chorales a step, {scaled(100, scale)} epochs. Beside it, for 20 chorales at",
        "the trained parameters, models 1 to 4 of Pyro's example (`benchmarks/_pyro_chains.py`, after it) under",
        "`TraceEnum_ELBO`: the largest difference in nats a step, that of the gradient in its lengths, and the",
        "processor time of a gradient by `SiteELBO` over that by Pyro, in turns. Its model 0, one sequence after the",
        f"other, has the same likelihood (tests). Mean ± standard error over {counted(seeds)} ({machine()}).",
        "",
        *markdown(
            [
                "model",
                "parameters",
                "train",
                "test",
                "steps",
                "seconds",
                "to stock",
                "gradient to stock",
                "time ÷ stock",
            ],
            rows,
        ),
        "",
        "![nats per time step of the training chorales by epoch](hidden.png)",
    ]


def beside_pyro(model: HiddenMarkovModel, given: dict[str, torch.Tensor], steps: float) -> dict[str, float]:
    """`SiteELBO` and ``TraceEnum_ELBO`` on Pyro's program: differences, and the ratio of their times of a gradient."""
    ours, program = SiteELBO()(model, NoGuide(model)), chains(model)
    parameters, spent = list(model.parameters()), {"ours": 0.0, "stock": 0.0}
    for turn in range(4):
        for name in spent:
            start = time.process_time()
            if name == "ours":
                value = ours(**given)
            else:
                value = TraceEnum_ELBO(max_plate_nesting=2).differentiable_loss(program, lambda **_: None, **given)
            slope = torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters)])
            spent[name] += time.process_time() - start if turn else 0.0  # the first is for warming up
            if name == "ours":
                first, exact = value.item(), slope
    return {
        "gap": abs(value.item() - first) / steps,
        "slope": ((slope - exact).norm() / exact.norm()).item(),
        "ratio": spent["ours"] / spent["stock"],
    }


def text(seeds: int, scale: float) -> list[str]:
    """Words by maximum likelihood, by a reward, and by a reward with a baseline or with relaxed tokens."""
    data = load("words")
    chain = bigram_chain(data.train.flatten(1))
    sizes = {"vocabulary": 27, "latent_dim": 8, "rnn_hidden": 64, "hidden": (64,)}
    test = torch.nn.functional.one_hot(data.test.flatten(1).long(), 27).float()
    likelihood = [["chain of pairs of letters", "", f"{chain(test, None).mean():.2f}", ""]]
    found, learned = Columns(), []
    for seed in seeded(seeds):
        model = SequenceVAE(data.data_shape, **sizes)
        guide = NormalGuide(model)
        with found.timed():
            fit(
                model, guide, data.train, valid=data.valid, loss=SiteELBO("pathwise", kl_weight=Linear(500)), lr=5e-3,
                batch_size=100, epochs=scaled(40, scale), seed=seed, restore_best=True, progress=False,
            )  # fmt: skip
        judged = evaluate(model, guide, data.test, num_samples=100)
        found.add(elbo=judged.elbo, evidence=judged.log_evidence)
        learned.append(model)
    likelihood.append(
        ["SequenceVAE, maximum likelihood", *found.cells("elbo", "evidence"), *found.cells("seconds", digits=0)]
    )
    drawn = {"maximum likelihood": spelled(learned[-1].sample_prior(12)["x"])}
    arms = {
        word: (word, 0.0) for word in ("score", "score-average", "nvil", "rloo", "gumbel-softmax", "straight-through")
    }
    arms |= {"rloo, from maximum likelihood, KL weight 1": ("rloo", 1.0)}
    rows, curves = [], {}
    for name, (word, weight) in arms.items():
        found, lines = Columns(), []
        for seed in seeded(seeds):
            model = SequenceVAE((1,), reward=chain, length=data.data_shape[-1], **sizes)
            if weight:
                model.load_state_dict(learned[seed].state_dict())
            policy = TokenPolicy(model.requires_grad_(False))
            with found.timed():
                lines.append(climbed(model, policy, word, weight, scaled(300, scale)))
            tokens = tokens_of(model, policy, 2_000)
            texts = spelled(tokens.argmax(-1))
            found.add(reward=chain(tokens, None).mean().item(), distinct=len(set(texts)) / len(texts))
        curves[name] = [sum(values) / seeds for values in zip(*lines, strict=True)]
        drawn[name] = texts[:12]
        rows.append(
            [name if weight else f"`{word}`", *found.cells("reward", "distinct"), *found.cells("seconds", digits=0)]
        )
    curve_picture(FOLDER / "text.png", curves, "step", "reward, nats", first=0, every=10)
    best, highest = best_word(chain)
    return [
        f"{len(data.train):,} words of Reuters' vocabulary to train on and {len(data.test)} to test, of three to ten",
        f"letters. Nats per word, log p(x) by 100 importance-weighted draws, {scaled(40, scale)} epochs; mean ±",
        f"standard error over {counted(seeds)} ({machine()}).",
        "",
        *markdown(["model", "ELBO", "log p(x)", "seconds"], likelihood),
        "",
        "The reward of a word is its log-probability under a chain of pairs of letters, counted in the training words;",
        f"{spelled(best.argmax(-1).unsqueeze(0))[0]!r} has the highest, {highest:.2f}, and test words have the mean in",
        f"the chain's row above. A fresh generator, {scaled(300, scale)} steps of Adam at 0.01, 20 words and two draws",
        "of each a step, KL weight 0: nothing rewards variety, the share of distinct words among 2,000 draws. The",
        "last row starts from the generator of the first table and penalizes the KL from it.",
        "",
        *markdown(["estimator", "reward", "distinct words", "seconds"], rows),
        "",
        "![reward by step](text.png)",
        "",
        "Draws (last seed):",
        "",
        *(f"- {name}: {', '.join(one or '–' for one in texts)}" for name, texts in drawn.items()),
    ]


def bigram_chain(tokens: torch.Tensor):
    """log p of one-hot tokens ``(..., L, 27)`` under a chain of pairs, counted in ``(N, L)`` with a tenth added."""
    counts = torch.full((28, 27), 0.1)  # the last row: the start
    before = torch.cat([torch.full((len(tokens), 1), 27), tokens[:, :-1].long()], 1)
    counts.index_put_((before.flatten(), tokens.long().flatten()), torch.ones(tokens.numel()), accumulate=True)
    log_p = (counts / counts.sum(-1, keepdim=True)).log()

    def reward(drawn: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        pairs = torch.einsum("...lv,vw,...lw->...", drawn[..., :-1, :], log_p[:27].to(drawn), drawn[..., 1:, :])
        return pairs + drawn[..., 0, :] @ log_p[27].to(drawn)

    reward.log_p = log_p
    return reward


def best_word(chain, length: int = 10) -> tuple[torch.Tensor, float]:
    """The one-hot tokens of highest reward, and that reward, by dynamic programming."""
    value, moves = torch.zeros(27), []
    for _ in range(length - 1):
        value, move = (chain.log_p[:27] + value).max(-1)
        moves.append(move)
    start = chain.log_p[27] + value
    path = [int(start.argmax())]
    for move in reversed(moves):
        path.append(int(move[path[-1]]))
    return torch.nn.functional.one_hot(torch.tensor(path), 27).float(), start.max().item()


def tokens_of(model: SequenceVAE, policy: TokenPolicy, count: int) -> torch.Tensor:
    with torch.no_grad():
        drawn = policy(torch.ones(count, 1))
    return torch.stack([drawn[site] for site in model.tokens], -2)


def climbed(model: SequenceVAE, policy: TokenPolicy, word: str, weight: float, steps: int) -> list[float]:
    """Maximize the expected reward; the mean reward of 200 draws at every tenth step."""
    loss = SiteELBO({"z": "pathwise", "*": word}, kl_weight=weight, num_particles=2)(model, policy)
    loss.initialize(torch.ones(20, 1))
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    rewards = []
    for step in range(steps):
        if step % 10 == 0:
            rewards.append(model.reward(tokens_of(model, policy, 200), None).mean().item())
        optimizer.zero_grad()
        (loss(torch.ones(20, 1)) / 20).backward()
        optimizer.step()
    return rewards


def switching(seeds: int, scale: float) -> list[str]:
    """Sequences of known law under switching state space models: the bound beside the truth, and the regimes found."""
    data, regimes = load("switching"), torch.from_numpy(switching_regimes()["test"])
    steps = data.labels["test"].sum().item()
    exact = particle_filter(data.test.squeeze(1), data.labels["test"])
    rows = [["the law, by a particle filter", "", f"{exact / steps:.3f}", "", ""]]
    for name, count in (("the law, guide trained", 0), ("3 regimes", 3), ("1 regime", 1)):
        found = Columns()
        for seed in seeded(seeds):
            model = SwitchingStateSpace(data.data_shape, num_regimes=count or 3, latent_dim=2)
            if not count:
                set_to_law(model.requires_grad_(False))
            guide = CombinerGuide(model, rnn_hidden=64)
            train, valid, test = (model.inputs(getattr(data, s), data.labels[s]) for s in ("train", "valid", "test"))
            with found.timed():
                fit(
                    model, guide, train, valid=valid, loss=SiteELBO("pathwise", num_particles=1), lr=3e-2,
                    clip_norm=100.0, batch_size=50, epochs=scaled(60, scale), seed=seed, restore_best=True,
                    progress=False,
                )  # fmt: skip
            judged = evaluate(model, guide, test, num_samples=50)
            found.add(elbo=judged.elbo * len(data.test) / steps, evidence=judged.log_evidence * len(data.test) / steps)
            few = {name: value[:80] for name, value in test.items()}
            drawn = to_arviz(model, guide, num_samples=20, groups=["posterior"], seed=seed, **few).posterior
            states = torch.stack([torch.from_numpy(drawn[site].values[0]) for site in model.summed], -1)
            found.add(right=agreement(states.long(), regimes[:80], few["mask"]))
        rows.append(
            [name, *found.cells("elbo", "evidence", digits=3), *found.cells("right"), *found.cells("seconds", digits=0)]
        )
    return [
        f"400 sequences to train on, 200 to test, of 10 to 30 steps of 6 numbers; {scaled(60, scale)} epochs. Nats per",
        "step of the test sequences (higher is better), log p(x) by 50 importance-weighted draws, beside a particle",
        "filter with 3,000 particles at the parameters of the law; the share of steps of 80 sequences whose most usual",
        f"regime in 20 draws is the true one, regimes renamed as fits best; mean ± standard error over {seeds} seeds",
        f"({machine()}).",
        "",
        *markdown(["model", "ELBO", "log p(x)", "regimes right", "seconds"], rows),
    ]


def set_to_law(model: SwitchingStateSpace) -> None:
    """Give the model the parameters of the data set."""
    law = {name: torch.from_numpy(value).float() for name, value in switching_law().items()}
    law |= {name: torch.log(torch.expm1(law[name] - model.min_sd)) for name in ("noise", "spread")}
    law |= {name: law[name].log() for name in ("first", "transition")}
    with torch.no_grad():
        for name, value in law.items():
            getattr(model, f"decoder_{name}").copy_(value)


def particle_filter(x: torch.Tensor, lengths: torch.Tensor, particles: int = 3_000) -> float:
    """log p of all sequences ``(N, T, D)`` together under the law, by a bootstrap filter."""
    law = {name: torch.from_numpy(value).float() for name, value in switching_law().items()}
    torch.manual_seed(0)
    count, total = len(x), torch.zeros(len(x))
    z = torch.zeros(count, particles, 2)
    regime = torch.multinomial(law["first"].expand(count, -1), particles, replacement=True)
    for t in range(x.shape[1]):
        if t:
            regime = (torch.rand(count, particles, 1) > law["transition"].cumsum(-1)[regime]).sum(-1).clamp(max=2)
        z = (law["dynamics"][regime] @ z.unsqueeze(-1)).squeeze(-1) + law["drift"][regime]
        z = z + law["noise"][regime] * torch.randn_like(z)
        output = (law["loading"][regime] @ z.unsqueeze(-1)).squeeze(-1) + law["offset"][regime]
        log_p = torch.distributions.Normal(output, law["spread"][regime]).log_prob(x[:, t].unsqueeze(1)).sum(-1)
        total = total + torch.where(t < lengths, log_p.logsumexp(-1) - math.log(particles), torch.zeros(()))
        chosen = torch.multinomial(log_p.softmax(-1), particles, replacement=True)
        z, regime = z.gather(1, chosen.unsqueeze(-1).expand_as(z)), regime.gather(1, chosen)
    return total.sum().item()


def agreement(states: torch.Tensor, regimes: torch.Tensor, mask: torch.Tensor) -> float:
    """The share of steps whose most frequent state ``(draws, N, T)`` is the true one, under the best renaming."""
    surest, inside = states.mode(0).values, mask > 0
    renamed = (torch.tensor(order)[surest] for order in itertools.permutations(range(3)))
    return max((one == regimes)[inside].float().mean().item() for one in renamed)


def mixed(seeds: int, scale: float) -> list[str]:
    """Latents of both kinds: variance and time of the gradient under each choice of estimators, after some training."""
    data = load("digits", binarize="static")
    lines = [
        f"Digits, after {scaled(10, scale)} epochs with the first row's words; the guide's gradient for 50 images, two",
        "draws each, from 60 gradients. Variance and variance × time are multiples of the first row's; the bias is in",
        f"lengths of the gradient (exact ones: chance); mean ± standard error over {counted(seeds)} ({machine()}).",
    ]
    for name, (label, smooth) in {
        "gaussian-mixture-vae": ("y", "z"),
        "semi-supervised-vae": ("y", "z"),
        "neural-bayes-net": ("label", "style"),
    }.items():
        arms = {
            f"{label}: {one}, {smooth}: {other}": {label: one, smooth: other}
            for one, other in (
                ("enumerate", "pathwise"),
                ("rloo", "pathwise"),
                ("gumbel-softmax", "pathwise"),
                ("enumerate", "rloo"),
                ("rloo", "rloo"),
            )
        }
        found: dict[str, Columns] = {arm: Columns() for arm in arms}
        first = next(iter(arms))
        for seed in seeded(seeds):
            model = models[name](data.data_shape)
            guide = LayeredGuide(model)
            fit(
                model, guide, model.inputs(data.train), loss=SiteELBO(arms[first]), lr=3e-3, batch_size=100,
                epochs=scaled(10, scale), seed=seed, progress=False,
            )  # fmt: skip
            report = audit(
                model, guide, model.inputs(data.test[:50]), estimators=arms, num_samples=60, num_particles=2,
                burn_in=10, seed=seed, reference=arms[first],
            )  # fmt: skip
            base = report.sel(estimator=first)
            for arm, columns in found.items():
                row = report.sel(estimator=arm)
                columns.add(variance=(row.total_variance / base.total_variance).item())
                columns.add(work=(row.work_normalized_variance / base.work_normalized_variance).item())
                columns.add(bias=row.relative_bias.item(), ms=1e3 * row.seconds.item())
        rows = [[arm, *columns.cells("variance", "bias", "ms", "work")] for arm, columns in found.items()]
        lines += ["", f"`{name}`:", "", *markdown(["estimators", "variance", "bias", "ms", "variance × time"], rows)]
    return lines


COUNTED = 0.95  # the count accuracy whose time is reported
SCENE_WORDS = {"enumerate": None, "nvil": None, "rloo": 2, "local-expectation": None}
SCENE_EPOCHS, SCENE_SUCCESS = (10, 6), (0.1, 1e-6)  # of the two stages
SCENE_HEADS = ["z_pres", "steps to 95 %", "seconds to 95 %", "count accuracy", "ELBO", "ms a step"]
SCENES = {"scenes": "scenes", "large_scenes": "mnist-scenes"}  # the data of each study
LARGE_EPOCHS = (4, 8)
LARGE = {"window": 28, "scale": 50 / 28, "what_dim": 50, "hidden": (200,)}

Curve = list[tuple[float, float, float]]  # steps, seconds of one core, count accuracy


def scenes(seeds: int, scale: float) -> list[str]:
    """Count accuracy of scenes of 0 to 2 digits under estimators of the presences: the time to 95 %, and the end."""
    first, second = (scaled(epochs, scale) for epochs in SCENE_EPOCHS)
    rows, curves = [], {}
    for word, particles in SCENE_WORDS.items():
        cells, curves[word] = counted_scenes(word, particles, seeds, first, second)
        rows.append([f"`{word}`", *cells])
    count_picture(FOLDER / "scenes-curves.png", curves)
    return [
        "0 to 2 digits of 8 × 8 on 20 × 20, 10,000 scenes to train on, batches of 64, Adam at 1e-3; z_where and z_what",
        f"are pathwise, z_pres takes the word of the row (`rloo` with two draws). {two_stages(first, second, 10_000)}",
        f"Steps and seconds (of one core) until {100 * COUNTED:.0f} % of 1,000 validation scenes are counted right,",
        "the share of 2,000 test scenes at the end, the ELBO of the last epoch in nats a scene, and milliseconds (of",
        f"one core) a step; mean ± standard error over {counted(seeds)} ({machine()}).",
        "",
        *markdown(SCENE_HEADS, rows),
        "",
        "![test scenes with the objects found, and their means](scenes.png)",
        "",
        "![count accuracy of validation scenes by time](scenes-curves.png)",
    ]


def large_scenes(seeds: int, scale: float) -> list[str]:
    """Count accuracy of scenes of 0 to 2 MNIST digits on 50 × 50, by time."""
    first, second = (scaled(epochs, scale) for epochs in LARGE_EPOCHS)
    cells, curve = counted_scenes("enumerate", None, seeds, first, second, "large_scenes", **LARGE)
    count_picture(FOLDER / "large_scenes-curves.png", {"enumerate": curve})
    return [
        "0 to 2 MNIST digits of 28 × 28 on 50 × 50, 20,000 scenes to train on, batches of 64, Adam at 1e-3; z_where",
        f"and z_what are pathwise, z_pres is enumerated. {two_stages(first, second, 20_000)} Columns",
        f"as for the small scenes; mean ± standard error over {counted(seeds)} ({machine()}).",
        "Pyro's tutorial, with other networks and hours on a GPU: 0.987.",
        "",
        *markdown(SCENE_HEADS, [["`enumerate`", *cells]]),
        "",
        "![test scenes with the objects found, and their means](large_scenes.png)",
        "",
        "![count accuracy of validation scenes by time](large_scenes-curves.png)",
    ]


def two_stages(first: int, second: int, scenes: int) -> str:
    return (
        f"{first} epochs at `judged` 0 and\n`success` {SCENE_SUCCESS[0]:g}, in which digits are found and presences do "
        f"not see the scene; then, from step {first * math.ceil(scenes / 64):,} on,\n{second} epochs at `judged` 1 and "
        f"`success` {SCENE_SUCCESS[1]:g}, in which they do."
    )


def counted_scenes(
    word: str, particles: int | None, seeds: int, first: int, second: int, study: str = "scenes", **sizes: Any
) -> tuple[list[str], Curve]:
    """The cells of one word's row, and the curve of its first seed."""
    data, found, curves = load(SCENES[study]), Columns(), []
    for seed in seeded(seeds):
        model = AttendInferRepeat(data.data_shape, success=SCENE_SUCCESS[0], **sizes)
        guide = RecurrentAttentionGuide(model)
        watch = Counting(guide, data.valid, data.labels["valid"])
        turn = first * math.ceil(len(data.train) / 64)
        fitted = fit(
            model, guide, data.train, loss=SiteELBO(model.estimators(word), num_particles=particles), lr=1e-3,
            batch_size=64, epochs=first + second, seed=seed, progress=False, on_epoch=watch,
            anneal={"success": Step(turn, *SCENE_SUCCESS), "judged": Step(turn, 0.0, 1.0)},
        )  # fmt: skip
        curves.append(watch.curve)
        step, seconds = watch.reached(COUNTED)
        found.add(steps=step, seconds=seconds, ms=1e3 * watch.curve[-1][1] / watch.curve[-1][0])
        found.add(test=guide.count_accuracy(data.test, data.labels["test"]), elbo=fitted.history[-1]["elbo"])
        if word == "enumerate" and seed == 0:
            scene_picture(FOLDER / f"{study}.png", model, guide, data.test[:20])
    cells = [reached(found.numbers["steps"]), reached(found.numbers["seconds"]), *found.cells("test", digits=3)]
    return [*cells, *found.cells("elbo", digits=1), *found.cells("ms", digits=0)], curves[0]


def reached(numbers: Sequence[float]) -> str:
    """Mean and standard error over the seeds that came so far, and how many they are unless all did."""
    known = [number for number in numbers if not math.isnan(number)]
    if not known:
        return "never"
    return several(known, 0) + (f" ({len(known)} of {len(numbers)} seeds)" if len(known) < len(numbers) else "")


class Counting:
    """Count accuracy by epoch, for ``on_epoch``: ``curve`` holds steps, seconds of one core, and the accuracy."""

    def __init__(self, guide: RecurrentAttentionGuide, x: torch.Tensor, counts: torch.Tensor):
        self.guide, self.x, self.counts = guide, x, counts
        self.curve: Curve = []
        self.start = time.process_time()

    def __call__(self, numbers: dict[str, float]) -> None:
        spent = time.process_time() - self.start
        self.curve.append((numbers["step"], spent, self.guide.count_accuracy(self.x, self.counts)))

    def reached(self, accuracy: float) -> tuple[float, float]:
        """Steps and seconds until that accuracy."""
        return next((one[:2] for one in self.curve if one[2] >= accuracy), (math.nan, math.nan))


def scene_picture(path: Path, model: AttendInferRepeat, guide: RecurrentAttentionGuide, x: torch.Tensor) -> None:
    """Scenes with a box around each object found, over their reconstructions."""
    from gumbo.pictures import figure, save

    found = guide.objects(x)
    with torch.no_grad():
        made_of = model.likelihood(found).mean
    made, axes = figure(4, len(x) // 2, figsize=(len(x) // 2, 4.2))
    for number, (scene, means) in enumerate(zip(x, made_of, strict=True)):
        upper, column = divmod(number, len(x) // 2)
        for row, image in ((2 * upper, scene), (2 * upper + 1, means)):
            axis = axes[row, column]
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], autoscale_on=False)  # boxes may leave the scene
        for step, color in zip(range(1, model.num_steps + 1), ("red", "lime", "cyan"), strict=False):
            if found[f"z_pres_{step}"][number]:
                left, top, right, bottom = model.boxes(found[f"z_where_{step}"][number]).tolist()
                corners = [left, right, right, left, left], [top, top, bottom, bottom, top]
                axes[2 * upper, column].plot(*(np.array(side) - 0.5 for side in corners), color=color, linewidth=1)
    save(made, path)


def count_picture(path: Path, curves: dict[str, Curve]) -> None:
    """Count accuracy by time, one line for each estimator."""
    from gumbo.pictures import figure, save

    made, axes = figure(figsize=(5.5, 3.4))
    for word, curve in curves.items():
        axes.plot([one[1] / 60 for one in curve], [one[2] for one in curve], label=word)
    axes.axhline(COUNTED, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlabel("minutes of one core")
    axes.set_ylabel("count accuracy")
    axes.legend(fontsize=8, frameon=False)
    save(made, path)


STUDIES: dict[str, Callable[[int, float], list[str]]] = {
    study.__name__: study
    for study in (
        topics,
        deep_topics,
        spikes,
        cells,
        chorales,
        chorales_couplings,
        priors,
        codes,
        grid,
        hidden,
        text,
        switching,
        mixed,
        scenes,
        large_scenes,
    )
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
        share = f" ({given.scale:.0%} of the study's epochs and steps)" if given.scale != 1 else ""
        lines = [f"`python benchmarks/collection.py {name}{options}`{share}:", ""]
        lines += STUDIES[name](given.seeds, given.scale)
        (FOLDER / f"{name}.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()

"""The pages of docs/models, one for each registered model: written from the registry, with an example that was run.

    python benchmarks/model_pages.py [--models gaussian-vae …] [--keep-examples]

What a page says of process, latents, guides and estimators comes from the class and from trying the programs. Its
example is a run of `gumbo train`, whose numbers and pictures are copied in; `--keep-examples` leaves those of pages
that have one as they are, and takes seconds. A model without an entry in `EXAMPLES` is trained with its
defaults. Runs on one thread.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import shlex
import shutil
import tempfile
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from _timing import machine

from gumbo.experiments import cli
from gumbo.experiments.listing import DATA_SHAPE, combinations
from gumbo.inference.estimators import estimators
from gumbo.models import GenerativeModel, Latent, models
from gumbo.pictures import figure, save
from gumbo.tables import markdown as markdown_table

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "models"
START, END = "<!-- example: a run of gumbo train -->", "<!-- end of the example -->"
PICTURES = {
    "reconstructions": "test data and their reconstructions",
    "prior_draws": "means of p(x | z) at draws of the prior",
}
EMPTY = {("attend-infer-repeat", "prior_draws")}  # scenes without objects
NUMBERS = {"elbo": "ELBO", "log_predictive": "log p", "rate": "rate", "distortion": "distortion"}

# What `gumbo train` is given beside the model, and what its numbers mean where that is not plain.
EXAMPLES: dict[str, tuple[str, str]] = {
    "gaussian-vae": ("--guide normal --estimator pathwise --kl_weight 'linear(500)' --lr 3e-3 --epochs 60", ""),
    "conv-vae": ("--guide normal --estimator pathwise --kl_weight 'linear(100)' --lr 3e-3 --epochs 25", ""),
    "categorical-vae": (
        "--guide categorical --estimator rloo --particles 4 --kl_weight 'linear(500)' --lr 3e-3 --epochs 60",
        "",
    ),
    "bernoulli-vae": (
        "--model_options.num_latents=50 --guide bernoulli --estimator disarm --kl_weight 'linear(500)' "
        "--lr 3e-3 --epochs 60",
        "",
    ),
    "sigmoid-belief-network": (
        "--model_options.layers='[50, 20]' --guide layered --estimator rloo --particles 4 --lr 1e-2 --epochs 25",
        "",
    ),
    "structured-prediction": (
        "--model_options.layers='[50, 20]' --guide layered --estimator rloo --particles 4 --lr 1e-2 --epochs 25",
        "The model sees upper halves and gives lower ones: those are what the pictures show.",
    ),
    "semi-supervised-vae": (
        "--model_options.latent_dim=10 --guide label-conditional --estimator rloo "
        "--kl_weight 'linear(500)' --lr 3e-3 --epochs 60",
        "`gumbo train` gives the label of every digit, so that this bounds log p(x, y), the label's log 1/10 included.",
    ),
    "gaussian-mixture-vae": (
        "--guide layered --estimator rloo --kl_weight 'linear(300)' --lr 3e-3 --epochs 40",
        "",
    ),
    "hierarchical-vae": (
        "--guide top-down-normal --estimator pathwise --kl_weight 'linear(500)' --lr 3e-3 --epochs 60",
        "",
    ),
    "conditional-vae": (
        "--guide normal --estimator pathwise --kl_weight 'linear(100)' --lr 3e-3 --epochs 25",
        "The condition is the digit's label, and each draw from the model is given the label of the test digit in its "
        "column.",
    ),
    "heteroscedastic-regression": (
        "--guide none --lr 3e-3 --epochs 25",
        "The label, as a number, is predicted from the image. Nothing is latent: the ELBO is log p(y given x).",
    ),
    "neural-classifier": (
        "--guide none --epochs 20",
        "Nothing is latent: the ELBO is log p(y given x), minus the cross-entropy.",
    ),
    "bayesian-regression": (
        "--model_options.hidden=[] --guide auto --estimator pathwise --batch_size 1297 --lr 3e-2 --epochs 100 "
        "--importance_samples 10",
        "The label, as a number, is predicted from the image. A batch is all the training data, as the weights' "
        "posterior needs it; for smaller ones give `data_size`.",
    ),
    "neural-bayes-net": (
        "--guide layered --estimator rloo --particles 4 --lr 3e-3 --epochs 25",
        "The network is label → style → image, of which data give the image alone.",
    ),
    "latent-dirichlet-allocation": (
        "--data reuters --model_options.hidden='[64]' --guide mean-field --estimator pathwise --lr 1e-2 "
        "--batch_size 50 --epochs 60",
        "These are probabilities of counts, multinomial coefficients included; perplexities are below.",
    ),
    "prod-lda": (
        "--data reuters --model_options.hidden='[64]' --guide normal --estimator pathwise --lr 1e-2 --batch_size 50 "
        "--epochs 60",
        "These are probabilities of counts, multinomial coefficients included; perplexities are below.",
    ),
    "poisson-vae": (
        "--model_options.num_latents=50 --guide mean-field --estimator rloo --particles 4 --kl_weight 'linear(500)' "
        "--lr 3e-3 --epochs 40",
        "",
    ),
    "negative-binomial-vae": (
        "--data cells --model_options.latent_dim=2 --guide normal --estimator pathwise --lr 3e-3 --epochs 60",
        "Given each cell's total; with the library as a latent the bound compares with the truth, see below.",
    ),
    "poisson-def": (
        "--data reuters --model_options.layers='[20, 5]' --guide layered --estimator pathwise --lr 1e-2 "
        "--clip_norm 100 --batch_size 50 --epochs 60",
        "",
    ),
    "vector-quantized-vae": (
        "--model_options.num_codes=8 --model_options.num_classes=8 --guide vector-quantized --estimator rloo "
        "--particles 4 --lr 3e-3 --epochs 40",
        "",
    ),
    "hidden-markov-model": (
        "--data jsb-chorales --model_options.num_states=16 --guide none --lr 3e-2 --batch_size 50 --epochs 10 "
        "--importance_samples 1",
        "Nats are per chorale, of 61 steps on average, and exact: the states are summed out. Fifty steps are far from "
        "enough: the curve is still rising.",
    ),
    "switching-state-space": (
        "--data switching --model_options.num_regimes=3 --model_options.latent_dim=2 --guide combiner "
        "--guide_options.rnn_hidden=64 --estimator pathwise --lr 1e-2 --clip_norm 100 --batch_size 50 --epochs 6 "
        "--importance_samples 20",
        "Nats are per sequence, of 20 steps on average; the bound is still rising after these 48 steps.",
    ),
    "sequence-vae": (
        "--data words --model_options.latent_dim=8 --model_options.rnn_hidden=64 --model_options.hidden='[64]' "
        "--guide normal --estimator pathwise --kl_weight 'linear(500)' --lr 5e-3 --epochs 12",
        "A datum is a word of up to ten letters. Draws, and training by rewards, are below.",
    ),
    "grid-world": (
        "--guide grid-policy --estimator rloo --particles 4 --kl_weight 0 --lr 5e-2 --epochs 25",
        "A datum is one walk, and the expected return is minus the distortion; the optimum is below.",
    ),
    "attend-infer-repeat": (
        "--data scenes --guide recurrent-attention "
        "--estimator '{z_pres_1: enumerate, z_pres_2: enumerate, z_pres_3: enumerate}' "
        "--anneal '{success: \"step(1570, 0.1, 1e-6)\", judged: step(1570)}' "
        "--batch_size 64 --epochs 16 --importance_samples 5",
        "Draws of the prior are empty, since `success` ends at 1e-6. How the digits come to be counted is below.",
    ),
    "deep-markov-model": (
        "--data jsb-chorales --model_options.latent_dim=20 --model_options.transition_hidden=50 --guide combiner "
        "--guide_options.rnn_hidden=100 --estimator pathwise --lr 3e-3 --clip_norm 10 --batch_size 20 --epochs 8 "
        "--importance_samples 10",
        "Nats are per chorale, of 61 steps on average; pictures show the keys of each step, time running downwards.",
    ),
    "expectation": (
        "--model_options.f=bandit --model_options.family=categorical --model_options.shape='[64]' "
        "--guide categorical --estimator rloo --particles 4 --kl_weight 0 --lr 1e-2 --epochs 25",
        "A policy points at one of 64 pixels and is paid if there is ink: the expected reward is minus the distortion. "
        "It was trained at KL weight 0, so that the ELBO, at weight 1, counts what it was not asked for.",
    ),
}

# The studies whose tables a page shows, of `benchmarks/collection.py` or `benchmarks/beside_scvi.py`.
STUDIES: dict[str, str | tuple[str, ...]] = {
    "hidden-markov-model": "hidden",
    "switching-state-space": "switching",
    "sequence-vae": "text",
    "gaussian-mixture-vae": "mixed",
    "semi-supervised-vae": "mixed",
    "neural-bayes-net": "mixed",
    "vector-quantized-vae": "codes",
    "attend-infer-repeat": ("scenes", "large_scenes"),
    "gaussian-vae": "priors",
    "grid-world": "grid",
    "latent-dirichlet-allocation": "topics",
    "prod-lda": "topics",
    "poisson-def": "deep_topics",
    "poisson-vae": "spikes",
    "negative-binomial-vae": ("cells", "scvi"),
    "deep-markov-model": ("chorales", "chorales_couplings"),
}


def _moved(text: str, folder: Path) -> str:
    """A text of a folder with its links as they are from the pages."""
    return re.sub(
        r"\]\((?!https?:)([^)]+)\)",
        lambda link: f"]({os.path.relpath(folder / link[1], ROOT / 'docs' / 'models')})",
        text,
    )


def measured(name: str) -> list[str]:
    """What its studies found, as far as they have been run."""
    studies = STUDIES.get(name, name)
    folder = ROOT / "benchmarks" / "results" / "collection"
    paths = [folder / f"{study}.md" for study in ([studies] if isinstance(studies, str) else studies)]
    found = [line for path in paths if path.exists() for line in (_moved(path.read_text().strip(), folder), "")]
    return ["## Measured", "", *found] if found else []


def page(name: str, rows: list[dict[str, Any]], example: str) -> str:
    """The page of one model; ``rows`` are its part of the grid of combinations."""
    cls = models[name]
    text, doctest = split_docstring(cls)
    lines = [
        f"# {cls.__name__}",
        "",
        f"`{name}` in `gumbo.models`, [{source_path(cls)}](../../{source_path(cls)})",
        "",
        markdown(text),
        "",
        "## The process in code",
        "",
        "```python",
        textwrap.dedent(inspect.getsource(cls.forward)).rstrip(),
        "```",
        "",
        "## Latents",
        "",
        *latents(cls),
        "",
        "## Guides that fit, and estimators",
        "",
        *fits(rows),
        "",
        *advice(cls),
        "## An example",
        "",
        START,
        "",
        example,
        "",
        END,
        "",
        *measured(name),
        "In Python:",
        "",
        "```pycon",
        ">>> import torch",
        f">>> from gumbo.models import {cls.__name__}",
        doctest,
        "```",
    ]
    return "\n".join(lines) + "\n"


def source_path(cls: type) -> str:
    return str(Path(inspect.getfile(cls)).resolve().relative_to(ROOT))


def split_docstring(cls: type) -> tuple[str, str]:
    """The words of a class's docstring, and its doctest."""
    words, prompt, rest = (inspect.getdoc(cls) or "").partition(">>> ")
    return words.rstrip(), prompt + rest


def markdown(text: str) -> str:
    """Docstrings are reStructuredText; a paragraph of them as Markdown that GitHub shows with its formulas."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(".. math::"):
            formula = textwrap.dedent(paragraph.removeprefix(".. math::").strip())
            paragraphs.append(f"```math\n{' '.join(line.strip() for line in formula.splitlines())}\n```")
        else:
            if paragraph.startswith("Args:\n"):
                entries = (" ".join(entry.split()) for entry in re.split(r"\n {4}(?=\S)", paragraph)[1:])
                paragraph = "Args:\n\n" + "\n".join(re.sub(r"^(\w+): ", r"- ``\1``: ", entry) for entry in entries)
            paragraph = re.sub(r":math:`([^`]*)`", r"$`\1`$", paragraph)
            paragraph = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", paragraph)
            paragraphs.append(paragraph.replace("``", "`"))
    return "\n\n".join(paragraphs)


def latents(cls: type[GenerativeModel]) -> list[str]:
    """The latent sites of the model with its default sizes, on digits."""
    model = cls(DATA_SHAPE)
    if not model.latents:
        return ["None: the evidence lower bound is the likelihood itself."]
    rows = [
        [f"`{site}`", latent.family, f"`{tuple(latent.shape)}`", "each datum" if latent.local else "all data"]
        for site, latent in model.latents.items()
    ]
    return [
        "With the default sizes, on images of 8 × 8:",
        "",
        *markdown_table(["site", "family", "shape", "one value for"], rows),
    ]


def fits(rows: list[dict[str, Any]]) -> list[str]:
    """A part for each form of the model: its guides, each with the words that serve it; then why others do not."""
    forms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        forms.setdefault(describe(row["variant"]), []).append(row)
    tables: dict[tuple, list[str]] = {}
    for form, members in forms.items():
        fitting = dict.fromkeys(row["guide"] for row in members if row["estimator"] != "*")
        table = tuple((guide, tuple(row_of(members, guide))) for guide in fitting)
        tables.setdefault(table, []).append(form)
    lines = []
    for table, named in tables.items():
        if len(tables) > 1:
            lines += ["", f"With {' or with '.join(named)}:", ""]
        lines += markdown_table(["guide", "estimators", "Pyro's own"], [[f"`{g}`", *cells] for g, cells in table])
    reasons = refused(rows)
    return [*lines, *(["", "Not with these guides:", "", *reasons] if reasons else [])]


SMOOTH = ("normal", "log-normal", "gamma", "beta", "dirichlet", "relaxed-categorical")
FEW = 64  # joint values of a site that are listed rather than drawn


def advice(cls: type[GenerativeModel]) -> list[str]:
    """Which estimator to give each site of a model whose latents are in part smooth and in part not."""
    for variant in ({}, *cls.variants):
        latents = cls(DATA_SHAPE, **variant).latents
        smooth = {site: "pathwise" for site, latent in latents.items() if latent.family in SMOOTH}
        if 0 < len(smooth) < len(latents):
            break
    else:
        return []
    # Sites are listed together, so that it is the product of their values that must be small.
    values = math.prod(values_of(latent) for site, latent in latents.items() if site not in smooth)
    word = "enumerate" if values <= FEW else "rloo"
    discrete = [site for site in latents if site not in smooth]
    words = {site: smooth.get(site, word) for site in latents} if len(discrete) < 4 else {**smooth, "*": word}
    named = ", ".join(f"{json.dumps(site) if site == '*' else site}: {word}" for site, word in words.items())
    form = f"With {describe(variant)}, latents" if variant else "Latents"
    return [
        f"{form} of both kinds take an estimator each, `SiteELBO({json.dumps(words)})`, `--estimator '{{{named}}}'`:",
        "the pathwise gradient where draws have one, a sum over values where they are few, `rloo` where they are many.",
        "",
    ]


def values_of(latent: Latent) -> float:
    """The number of joint values of a discrete site."""
    if latent.family == "categorical":
        return latent.shape[-1] ** math.prod(latent.shape[:-1])
    return 2**latent.size if latent.family == "bernoulli" and latent.size < 7 else math.inf


def describe(variant: Mapping[str, Any]) -> str:
    if not variant:
        return "the defaults"
    if "nodes" in variant:  # a whole graph, of which it matters what is observed
        return f"observed {', '.join(variant.get('observed', ['all']))} of {' → '.join(variant['nodes'])}"
    return "`" + ", ".join(f"{option}={value!r}" for option, value in variant.items()) + "`"


def row_of(rows: Iterable[dict[str, Any]], guide: str) -> list[str]:
    """The estimators, and Pyro's own losses, that serve a guide."""
    words = [row["estimator"] for row in rows if row["guide"] == guide and not row["reason"]]
    ours, stock = [w for w in words if w in estimators], [w for w in words if w not in estimators]
    if set(ours) == set(estimators):
        return ["every one", spoken(stock)]
    return [spoken(ours), spoken(stock)]


def spoken(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words) or "none"


def refused(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Each reason for which an estimator of ours does not serve a guide that fits, with those that it bars."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"] and row["estimator"] in estimators:
            words = by_reason.setdefault(re.sub(r"^site '[^']*': ", "", row["reason"]), [])
            if row["estimator"] not in words:
                words.append(row["estimator"])
    return [f"- {spoken(words)}: {reason}" for reason, words in by_reason.items()]


def run_example(name: str) -> str:
    """Train the model as its command says; the command, the numbers, and the pictures, which are copied."""
    options, note = EXAMPLES.get(name, ("--epochs 25", ""))
    command = f"gumbo train --model {name} {options}"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        cli.main([*shlex.split(command)[1:], "--folder", str(run)])
        found = json.loads((run / "results.json").read_text())
        drawn = [picture for picture in PICTURES if (run / "plots" / f"{picture}.png").exists()]
        if {"reuters", "words", "cells"} & set(options.split()):
            drawn = []  # counts of words or genes side by side are no picture, and letters none
        drawn = [picture for picture in drawn if (name, picture) not in EMPTY]
        for picture in drawn:
            shutil.copy(run / "plots" / f"{picture}.png", DOCS / "figures" / f"{name}-{picture}.png")
        if not drawn:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            learning_picture(DOCS / "figures" / f"{name}-learning_curve.png", lines, "--kl_weight 0 " in f"{options} ")
    test = found["test"]
    told = re.search(r"--data (\S+)", options)
    rows = f"rows of `{told[1]}`" if told else "digits"
    meaning = f"The value of log p is a lower bound, from {test['num_samples']} draws a datum."
    if models[name](DATA_SHAPE).summed and not models[name](DATA_SHAPE).latents:
        meaning = "Nothing is drawn, so that the ELBO is log p."
    elif test["log_evidence"] != test["log_predictive"]:
        meaning = f"Here log p is the log predictive density, over {test['num_samples']} draws of the weights."
    lines = [
        "```",
        command,
        "```",
        "",
        f"On the {test['num_data']} test {rows}, in nats per datum, after {found['epochs']} epochs of "
        f"{found['ms_per_step']:.1f} ms a step ({machine()}):",
        "",
        *markdown_table(list(NUMBERS.values()), [[f"{test[key]:.2f} ± {test[f'{key}_se']:.2f}" for key in NUMBERS]]),
        "",
        f"{meaning} {note}".rstrip(),
    ]
    for picture in drawn:
        lines += ["", f"![{PICTURES[picture]}](figures/{name}-{picture}.png)"]
    if not drawn:
        lines += ["", f"![the objective by epoch](figures/{name}-learning_curve.png)"]
    return "\n".join(lines)


def learning_picture(path: Path, lines: list[dict[str, Any]], rewarded: bool) -> None:
    """The objective of each epoch, and the ELBO of validation data unless the KL has no part in the objective."""
    made, axes = figure(figsize=(5.5, 3.4))
    names = {"valid_elbo": "validation: ELBO"} if not rewarded else {}
    names |= {name: f"training: {name}" for name in ("elbo", "weighted-elbo") if name in lines[-1]}
    if rewarded:
        names["weighted-elbo"] = "training: expected reward"
    for name, label in names.items():
        known = [line for line in lines if name in line]  # the first line is before the first step
        axes.plot([line["epoch"] for line in known], [line[name] for line in known], label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per datum" if not rewarded else "reward")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(made, path)


def kept_example(name: str) -> str | None:
    """The example that the page has, if there is one."""
    path = DOCS / f"{name}.md"
    before, found, rest = path.read_text().partition(START) if path.exists() else ("", "", "")
    return rest.partition(END)[0].strip() if found else None


def index() -> str:
    """The list of all pages."""
    rows = []
    for name, cls in models.items():
        if not (DOCS / f"{name}.md").exists():
            continue  # its page is still to be written
        model = cls(DATA_SHAPE)
        sites = ", ".join(f"`{site}` {latent.family}" for site, latent in model.latents.items()) or "none"
        summary = markdown(split_docstring(cls)[0].split("\n\n")[0].replace("\n", " "))
        rows.append([f"[{cls.__name__}]({name}.md)", f"`{name}`", sites, summary])
    return "\n".join(
        [
            "# Models",
            "",
            "A page for each registered model: its process in formulas and in code, its latents, the guides that fit,",
            "the estimators that serve each guide, and an example that was run. `gumbo list` shows the same grid for",
            "all. The pages are written by `python benchmarks/model_pages.py`.",
            "",
            *markdown_table(["model", "name", "latents", ""], rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models), choices=list(models))
    parser.add_argument("--keep-examples", action="store_true", help="do not train again what has an example")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (DOCS / "figures").mkdir(parents=True, exist_ok=True)
    for name in given.models:
        example = kept_example(name) if given.keep_examples else None
        (DOCS / f"{name}.md").write_text(page(name, combinations([name]), example or run_example(name)))
        print(name, flush=True)
    (DOCS / "README.md").write_text(index())


if __name__ == "__main__":
    main()

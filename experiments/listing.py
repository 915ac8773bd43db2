"""``gumbo list``: models, guides, estimators, objectives, data sets, what fits what, and the valid combinations."""

from __future__ import annotations

import functools
import inspect
import io
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gumbo.errors import UnknownName
from gumbo.experiments._command import run_command

DATA_SHAPE = (1, 8, 8)
NARROWEST = 4  # the least width of a table's column, in characters, however narrow the terminal

KINDS = (
    "models",
    "guides",
    "families",
    "likelihoods",
    "priors",
    "estimators",
    "objectives",
    "stock",
    "data",
    "combinations",
)


@dataclass
class List:
    """Show models, guides, estimators, objectives and data sets, what fits what, and which combinations are valid.

    Args:
        kind: only these: models, guides, families, likelihoods, priors, estimators, objectives, stock, data or
            combinations; the flag may be left out, as in `gumbo list objectives`.
        json: everything as JSON.
        reasons: also print why each other combination is not valid.
    """

    kind: str | None = None
    json: bool = False
    reasons: bool = False


def catalogue(names: Iterable[str] | None = None, kinds: Iterable[str] = KINDS) -> dict[str, Any]:
    """The content of each registry with its declarations, and the grid of combinations.

    Args:
        names: the models of the grid by their registered names, by default all.
        kinds: the kinds to include, from `KINDS`.

    Returns:
        For each kind a dict by name; for ``combinations`` a list, see :func:`combinations`. Models have the ``guides``
        and ``data`` that fit them, guides, likelihoods and data sets their ``models``, estimators the ``families`` they
        serve.
    """
    from gumbo.experiments.data import datasets, described
    from gumbo.guides import guides
    from gumbo.inference import stock_elbos
    from gumbo.inference.objectives import objectives
    from gumbo.models import models
    from gumbo.models.families import families

    guides_of, data_of = functools.cache(_guides_of), functools.cache(_data_of)  # trials, made once

    made: dict[str, Callable[[], Any]] = {
        "models": lambda: {
            name: _model(cls) | {"guides": guides_of(cls), "data": data_of(cls)} for name, cls in models.items()
        },
        "guides": lambda: {
            name: {
                "class": cls.__name__,
                "families": list(cls.families),
                "models": [model for model, made in models.items() if name in guides_of(made)],
                "summary": _summary(cls),
            }
            for name, cls in guides.items()
        },
        "families": lambda: {
            name: {"support": str(family.support), "outputs": family.outputs} for name, family in families.items()
        },
        "likelihoods": _likelihoods,
        "priors": _priors,
        "estimators": _estimators,
        "objectives": lambda: {name: _objective(make()) for name, make in objectives.items()},
        "stock": lambda: {
            name: {"class": cls.__name__, "summary": _without_references(_summary(cls))}
            for name, cls in stock_elbos.items()
        },
        "data": lambda: {
            name: {
                "holds": described[name].holds if name in described else "",
                "source": described[name].source if name in described else "",
                "models": [model for model, made in models.items() if name in data_of(made)],
            }
            for name in datasets
        },
        "combinations": lambda: combinations(names),
    }
    return {kind: made[kind]() for kind in kinds}


def _summary(thing: Any) -> str:
    """The first paragraph of a docstring, without the marks of reST."""
    return re.sub(r"(?::\w+:)?`+~?([^`]*)`+", r"\1", " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()))


def _without_references(text: str) -> str:
    """The sentences that cite no numbered reference, whose list is elsewhere in the docstring."""
    return " ".join(sentence for sentence in re.split(r"(?<=\.)\s+", text) if not re.search(r"\[\d+\]", sentence))


def _likelihoods() -> dict[str, dict[str, Any]]:
    from gumbo.models import models
    from gumbo.models.likelihoods import likelihoods

    taking = [name for name, cls in models.items() if "likelihood" in inspect.signature(cls).parameters]
    return {name: {"options": dict(found.options), "models": taking} for name, found in likelihoods.items()}


def _priors() -> dict[str, dict[str, Any]]:
    from gumbo.models.priors import code_priors, priors

    found = {}
    for of, registry in (("vectors", priors), ("one-hot codes", code_priors)):
        for name, make in registry.items():
            taken = inspect.signature(make).parameters.values()
            options = {one.name: one.default for one in taken if one.kind is one.KEYWORD_ONLY}
            found[name] = {"of": of, "options": options, "summary": _summary(make)}
    return found


def _model(cls: type) -> dict[str, Any]:
    import torch

    with torch.random.fork_rng():
        model = cls(DATA_SHAPE, **cls.variants[0])
    latents = {site: {"family": latent.family, "shape": list(latent.shape)} for site, latent in model.latents.items()}
    return {"class": cls.__name__, "summary": _summary(cls), "latents": latents}


def _guides_of(cls: type) -> list[str]:
    """The guides that serve a variant of the model, and "none" where it needs none."""
    import torch

    from gumbo.guides import guides

    with torch.random.fork_rng():
        forms = [cls(DATA_SHAPE, **variant) for variant in cls.variants]  # type: ignore[attr-defined]
    fits = [name for name, guide in guides.items() if any(not guide.why_not(form) for form in forms)]
    return fits or ["none"]


def _data_of(cls: type) -> list[str]:
    """The data sets of whose kind a variant of the model takes two rows, by a trial."""
    from gumbo.experiments.data import datasets, described

    kinds: dict[int, bool] = {}  # many data sets are of one kind
    found = []
    for name in datasets:
        example = described[name].example if name in described else None
        if example is None:
            continue
        if id(example) not in kinds:
            kinds[id(example)] = any(_takes(cls, variant, example) for variant in cls.variants)  # type: ignore
        if kinds[id(example)]:
            found.append(name)
    return found


def _takes(cls: type, variant: Any, example: Any) -> bool:
    """Whether the model of that variant and of the rows' shape gives them a finite log-probability."""
    import pyro
    import torch

    from gumbo.errors import PROGRAM_ERRORS, GumboError

    rows, labels = example
    x = torch.from_numpy(rows).unsqueeze(1)
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(),
        torch.no_grad(),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(),
    ):
        warnings.simplefilter("ignore")
        try:
            model = cls(x.shape[1:], **variant)
            given = model.inputs(x, None if labels is None else torch.from_numpy(labels))
            trace = pyro.poutine.trace(model).get_trace(**given)
            return bool(torch.as_tensor(trace.log_prob_sum()).isfinite())
        except (GumboError, *PROGRAM_ERRORS):
            return False


def _estimators() -> dict[str, dict[str, Any]]:
    """The estimators, each with the families of latents whose sites it serves."""
    from gumbo.inference.estimators import estimators

    sites = dict(_sites_of_families())
    return {
        name: _estimator(make) | {"families": [family for family, site in sites.items() if make().supports(site)]}
        for name, make in estimators.items()
    }


def _sites_of_families() -> Iterator[tuple[str, Any]]:
    """A sample site of each family of latents, as a Pyro message."""
    import pyro
    import torch

    from gumbo.models.families import Latent, distribution, families, num_outputs

    with torch.random.fork_rng():
        for family in families:
            latent = Latent(family, (2,))  # few values, which every estimator can list
            fn = distribution(latent, torch.zeros(2, num_outputs(latent)))

            def program(fn: Any = fn) -> None:
                with pyro.plate("data", 2):
                    pyro.sample("z", fn)

            yield family, pyro.poutine.trace(program).get_trace().nodes["z"]


def _estimator(make: Any) -> dict[str, Any]:
    estimator = make()
    return {
        "class": repr(estimator),
        "unbiased": estimator.unbiased,
        "objective_name": estimator.objective_name(),
        "min_particles": estimator.min_particles,
        "evaluations": estimator.evaluations(estimator.min_particles),
        "needs_relaxed_model": estimator.needs_relaxed_model,
        "objectives": sorted(estimator.objectives),
        "summary": _summary(type(estimator)),
    }


def _objective(objective: Any) -> dict[str, Any]:
    from gumbo.inference.estimators import estimators

    takes = objective.takes_estimators
    return {
        "class": repr(objective),
        "estimators": [word for word, make in estimators.items() if takes and objective.accepts(make())],
        "takes_kl_weight": objective.takes_kl_weight,
        "weighs_rows": objective.weighs_rows,
        "summary": _summary(type(objective)),
    }


def combinations(names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Each variant of these models, by default of all, with each guide and word: ``reason`` is empty where it is valid.

    Args:
        names: models by their registered names.
    """
    import torch

    from gumbo.guides import guides
    from gumbo.inference import stock_elbos
    from gumbo.inference.engine.looks import refusals
    from gumbo.inference.estimators import estimators
    from gumbo.models import models

    rows = []
    words = [*stock_elbos, *estimators]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for model_name in models if names is None else names:
            cls = models[model_name]
            for variant in cls.variants:
                model = cls(DATA_SHAPE, **variant)
                form = {"model": model_name, "variant": dict(variant)}
                for guide_name, guide_cls in guides.items():
                    row = {**form, "guide": guide_name}
                    if reason := guide_cls.why_not(model):
                        rows.append({**row, "estimator": "*", "reason": reason})
                        continue
                    guide = guide_cls(model)
                    ours = refusals(model, guide, **model.example(2))
                    rows += [
                        {
                            **row,
                            "estimator": word,
                            "reason": ours[word] if word in ours else why_not(model, guide, word),
                        }
                        for word in words
                    ]
    return rows


def why_not(model: Any, guide: Any, word: str) -> str:
    """Why a loss refuses a pair, in one line, found by a trial; empty if it gives a gradient."""
    import pyro
    import torch

    from gumbo.errors import GumboError, raised_here
    from gumbo.inference import stock_elbos

    if model.summed and word in stock_elbos and word != "trace-enum":
        return (
            f"the model's sites {model.summed[0]!r}, ... are to be summed out, which only trace-enum of Pyro's own does"
        )
    with pyro.get_param_store().scope(), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss_for(word).loss_and_grads(model, guide, **model.example(2))
        except (GumboError, NotImplementedError, ValueError) as error:
            if not isinstance(error, GumboError) and raised_here(error):
                raise
            # Pyro refuses by NotImplementedError and ValueError, with the trace's shapes appended.
            return " ".join(str(error).split("Trace Shapes")[0].split()) or f"Pyro refuses it ({type(error).__name__})"
        finally:
            for parameter in (*model.parameters(), *guide.parameters()):
                parameter.grad = None
    return ""


def loss_for(word: str):
    """A loss of that name, with the first objective that it supports."""
    from gumbo.inference import make_loss
    from gumbo.inference.estimators import estimators

    if word not in estimators:
        return make_loss(word, max_plate_nesting=1) if word == "trace-enum" else make_loss(word)
    objectives = estimators[word]().objectives
    return make_loss(word, **({} if "elbo" in objectives else {"objective": sorted(objectives)[0]}))


def show(config: List) -> None:
    if config.kind is not None and config.kind not in KINDS:
        raise UnknownName("kind", config.kind, KINDS)
    found = catalogue(kinds=KINDS if config.kind is None else (config.kind,))
    if config.json:
        print(json.dumps(found, indent=1))
        return
    for place, (kind, entries) in enumerate(found.items()):
        if kind == "combinations":
            print(("\n" if place else "") + TITLES[kind])
            _show_combinations(entries, config.reasons)
            continue
        if kind == "data":
            entries = _with_repeats(entries)
        rows = [[name, *_cells(kind, entry)] for name, entry in entries.items()]
        print(table(TITLES.get(kind, kind), HEADS[kind], rows), end="")
        if kind in NOTES:
            print(NOTES[kind])


TITLES = {"families": "families of latents", "stock": "Pyro's own", "combinations": "valid combinations"}
HEADS = {
    "models": ["model", "latents", "guides, and [data]"],
    "guides": ["guide", "families of latents", "models"],
    "families": ["family", "support", "outputs for each number of a value"],
    "likelihoods": ["likelihood", "options"],
    "priors": ["prior", "of", "options"],
    "estimators": ["estimator", "gradient", "objectives", "families of latents"],
    "objectives": ["objective", "estimators", "what it is"],
    "stock": ["word", "class", "what it is"],
    "data": ["data", "rows, and [source]", "models"],
}
NOTES = {
    "models": "`gumbo list estimators` has the latents that each estimator serves.",
    "likelihoods": "For models with these options: `--model_options.likelihood=WORD` and\n"
    "`--model_options.likelihood_options='{NAME: VALUE}'`.",
    "priors": "For models with these options: `--model_options.prior=WORD` and\n"
    "`--model_options.prior_options='{NAME: VALUE}'`.",
    "data": "Data of your own: --data mypackage:my_loader.",
}


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """A table as text; by default of the terminal's width, and of 80 columns where there is none.

    >>> print(table("made of", ["word", "means"], [["rloo", "leave-one-out " * 7]], width=40))
    made of
    <BLANKLINE>
      word   means
      ─────────────────────────────────────
      rloo   leave-one-out leave-one-out
             leave-one-out leave-one-out
             leave-one-out leave-one-out
             leave-one-out
    <BLANKLINE>
    <BLANKLINE>
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else 80)
    # No name is broken, as long as the names of all columns fit beside each other; rich would cut what does not fit.
    longest = [max(len(word) for row in (heads, *rows) for word in row[k].split() or [""]) for k in range(len(heads))]
    least = [longest[0], *(min(size, 30) for size in longest[1:])]
    room = width - 3 * len(heads)
    while sum(least) > room and max(least[1:], default=0) > NARROWEST:
        least[least.index(max(least[1:]), 1)] -= 1
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(heads):
        made.add_column(head, no_wrap=place == 0, overflow="fold", min_width=least[place])
    for row in rows:
        made.add_row(*row)
    written = io.StringIO()
    Console(width=width - 1, markup=False, highlight=False, emoji=False, file=written).print(made)
    return "".join(f"{line.rstrip()}\n" for line in [title, *(f" {line}" for line in written.getvalue().splitlines())])


def _cells(kind: str, entry: dict[str, Any]) -> list[str]:
    """The columns of one entry, after its name."""
    if kind == "models":
        latents = ", ".join(dict.fromkeys(latent["family"] for latent in entry["latents"].values())) or "none"
        return [latents, f"{', '.join(entry['guides'])}\n[{_shortened(entry['data'])}]"]
    if kind == "guides":
        return [", ".join(entry["families"]), ", ".join(entry["models"]) or "any of global latents"]
    if kind == "families":
        return [entry["support"], str(entry["outputs"])]
    if kind == "likelihoods":
        return [_options(entry)]
    if kind == "priors":
        return [entry["of"], _options(entry)]
    if kind == "estimators":
        said = "unbiased" if entry["unbiased"] else "biased"
        said += f", {entry['min_particles']}+ draws" if entry["min_particles"] > 1 else ""
        if entry["needs_relaxed_model"]:
            own = entry["unbiased"] and entry["objective_name"] != "elbo"  # an audit finds it biased for the ELBO
            said += " for the relaxed model only" if own else ", relaxes the model"
        return [said, ", ".join(entry["objectives"]), _families(entry["families"])]
    if kind == "objectives":
        words = entry["estimators"]
        said = words[0] if len(words) == 1 else f"{len(words) or 'no'} estimators"
        return [said, entry["summary"]]
    if kind == "data":
        held = [text for text in (entry["holds"], entry["source"] and f"[{entry['source']}]") if text]
        return ["\n".join(held) or "–", entry.get("as", "") or ", ".join(entry["models"]) or "–"]
    return [entry["class"], entry["summary"]]


def _options(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in entry["options"].items()) or "none"


def _families(served: Sequence[str]) -> str:
    from gumbo.models.families import families

    left = [family for family in families if family not in served]
    if not left:
        return "all"
    if len(left) < len(served) / 2:
        return f"all but {', '.join(left)}"
    return ", ".join(served) or "none of the collection's"


def _shortened(data: Sequence[str]) -> str:
    """The data sets, those of images in a word."""
    from gumbo.experiments.data import IMAGES, described

    images = [name for name in data if any(described[name].example is one for one in IMAGES)]
    return ", ".join([*(["images"] if images else []), *(name for name in data if name not in images)]) or "–"


def _with_repeats(entries: dict[str, Any]) -> dict[str, Any]:
    """The data sets; of one with the models of another the name of that other in place of the models."""
    made: dict[str, Any] = {}
    first: dict[tuple[str, ...], str] = {}
    for name, entry in entries.items():
        models = tuple(entry["models"])
        made[name] = entry | ({"as": f"as {first[models]}"} if models in first and models else {})
        first.setdefault(models, name)
    return made


def _show_combinations(found: list[dict[str, Any]], reasons: bool) -> None:
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        pairs.setdefault((_form(row), row["guide"]), []).append(row)
    for (form, guide), rows in pairs.items():
        refused = {row["estimator"] for row in rows if row["reason"]}
        valid = [word for word in dict.fromkeys(row["estimator"] for row in rows) if word not in refused]
        if valid:
            print(f"  {form} with guide {guide}\n      {', '.join(valid)}")
        if reasons:
            for row in rows:
                if row["reason"]:
                    what = f"guide {guide}" if row["estimator"] == "*" else f"guide {guide}, {row['estimator']}"
                    print(f"    not {form} with {what}: {row['reason']}")
    if not reasons:
        print("\n`gumbo list --reasons` says why the others are not valid.")


def _form(row: dict[str, Any]) -> str:
    # Sizes keep the trial small; other options of a variant are forms of the model.
    options = {key: value for key, value in row["variant"].items() if isinstance(value, (bool, str))}
    return row["model"] + (f" ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")


def main(argv: Sequence[str] | None = None, prog: str = "gumbo list") -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--kind", *argv]
    run_command(List, show, argv, prog)


if __name__ == "__main__":
    main()

"""``gumbo list``: models, guides, families of latents, estimators, objectives, and which combinations are valid."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gumbo.errors import UnknownName
from gumbo.experiments._command import run_command

DATA_SHAPE = (1, 8, 8)


KINDS = ("models", "guides", "families", "estimators", "objectives", "stock", "combinations")


@dataclass
class List:
    """Show models, guides, estimators, objectives, and which combinations are valid.

    Args:
        kind: only these: models, guides, families, estimators, objectives, stock or combinations; the flag may be left
            out, as in `gumbo list objectives`.
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
        For each kind a dict by name; for ``combinations`` a list, see :func:`combinations`.
    """
    from gumbo.guides import guides
    from gumbo.inference import stock_elbos
    from gumbo.inference.estimators import estimators
    from gumbo.inference.objectives import objectives
    from gumbo.models import models
    from gumbo.models.families import families

    made: dict[str, Callable[[], Any]] = {
        "models": lambda: {name: _model(cls) for name, cls in models.items()},
        "guides": lambda: {
            name: {"class": cls.__name__, "families": list(cls.families), "summary": _summary(cls)}
            for name, cls in guides.items()
        },
        "families": lambda: {
            name: {"support": str(family.support), "outputs": family.outputs} for name, family in families.items()
        },
        "estimators": lambda: {name: _estimator(make) for name, make in estimators.items()},
        "objectives": lambda: {name: _objective(make()) for name, make in objectives.items()},
        "stock": lambda: {name: {"class": cls.__name__, "summary": _summary(cls)} for name, cls in stock_elbos.items()},
        "combinations": lambda: combinations(names),
    }
    return {kind: made[kind]() for kind in kinds}


def _summary(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _model(cls: type) -> dict[str, Any]:
    import torch

    with torch.random.fork_rng():
        model = cls(DATA_SHAPE, **cls.variants[0])
    latents = {site: {"family": latent.family, "shape": list(latent.shape)} for site, latent in model.latents.items()}
    return {"class": cls.__name__, "summary": _summary(cls), "latents": latents}


def _estimator(make: Any) -> dict[str, Any]:
    estimator = make()
    return {
        "class": repr(estimator),
        "unbiased": estimator.unbiased,
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

    from gumbo.errors import GumboError
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
        print(("\n" if place else "") + TITLES.get(kind, kind))
        if kind == "combinations":
            _show_combinations(entries, config.reasons)
            continue
        for name, entry in entries.items():
            print(f"  {name:24} {_line(kind, entry)}")


TITLES = {"families": "families of latents", "stock": "Pyro's own", "combinations": "valid combinations"}


def _line(kind: str, entry: dict[str, Any]) -> str:
    """The columns of one entry."""
    if kind == "models":
        latents = ", ".join(f"{site}: {latent['family']}" for site, latent in entry["latents"].items())
        return f"{latents:28} {entry['summary']}"
    if kind == "guides":
        return f"{', '.join(entry['families']):28} {entry['summary']}"
    if kind == "families":
        return f"{entry['support']:28} outputs for each number of a value: {entry['outputs']}"
    if kind == "estimators":
        said = "unbiased" if entry["unbiased"] else "biased"
        said += f", {entry['min_particles']}+ particles" if entry["min_particles"] > 1 else ""
        said += ", relaxes the model" if entry["needs_relaxed_model"] else ""
        return f"{said:36} {', '.join(entry['objectives']):12} {entry['class']}"
    if kind == "objectives":
        words = entry["estimators"]
        said = words[0] if len(words) == 1 else f"{len(words) or 'no'} estimators"
        return f"{said:16} {entry['summary']}"
    return entry["class"]


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

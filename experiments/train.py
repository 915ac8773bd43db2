"""``gumbo train``: any model, guide, estimator and data set, by name or by import path."""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gumbo.errors import BadInput, GumboError, Interrupted, UnknownName
from gumbo.experiments._command import check_least, run_command, speaks
from gumbo.experiments._names import current_folder_importable, marked, named, named_objective, refuse_untrusted
from gumbo.experiments._programs import AMORTIZE, ROWS, OwnProgram, amortized, own_model
from gumbo.experiments._runs import WEIGHTS, RunFolder, run_settings
from gumbo.launcher import launched
from gumbo.options import check_known
from gumbo.registry import describe

if TYPE_CHECKING:
    from gumbo.inference.posterior.evaluation import Evaluation
    from gumbo.inference.training.schedules import Schedule


@dataclass
class Train:
    """Train a model with a guide and an estimator on a data set; `gumbo list` shows the names.

    Args:
        model: a model's name, or the import path of a class or of any Pyro program, `mypkg:model`.
        guide: a guide's name, the import path of a class or of a function that makes one from the model, or `amortize`,
            which fits any program; by default the first that fits.
        estimator: the gradient estimator: one word (`auto` measures and selects; options are in a call, as in
            `'arms(draws=3)'`), or one for each site, as in `--estimator '{gate: enumerate, z: pathwise}'`; Pyro's own
            ELBOs are `trace`, `trace-graph`, ….
        objective: a word of docs/objectives.md, such as elbo, iwae or renyi.
        objective_options: options of the objective, as in `--objective_options.alpha=0.5` for renyi.
        particles: draws per step; by default the estimator's smallest number.
        kl_weight: the weight of the KL in training, a number or a schedule of the step, as in `linear(1000)` or
            `cyclical(4000, 4)`; the reported bound always has weight 1.
        temperature: of a relaxed estimator, a number or a schedule, as in `exponential(1.0, 0.5, 1e-3)`.
        data: a data set's name, or the import path of a function: of (folder, splits), or of nothing, which returns a
            Dataset, a DataLoader or arrays, or a dict of them by split.
        binarize: static (at one half), dynamic (a draw per epoch), or null for unchanged values; by default the known
            images are binarized at one half, and your own data are not changed.
        model_options: the model's own arguments, as in `--model_options.latent_dim=10`.
        guide_options: the guide's own arguments, as in `--guide_options.hidden=[64,32]`.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop or sgd.
        lr: learning rate, a number or a schedule of the step with its rates, as in `cosine(10000, 1e-3, 1e-5)`.
        clip_norm: bound on the norm of the gradient of all parameters together.
        anneal: a schedule of the step for each buffer of the model or guide that changes in training, as in
            `--anneal '{success: "step(900, 0.1, 1e-6)", judged: step(900)}'` of attend-infer-repeat.
        epochs: number of epochs; with `--resume`, the total.
        batch_size: images per step.
        seed: initial weights, batches and noise.
        patience: stop after that many epochs without a better validation ELBO, counted from the end of KL warm-up and
            temperature schedules, and keep the best parameters.
        until: converged stops when the iterates are stationary, and takes their average.
        importance_samples: draws per datum for the final log p(x).
        checkpoint_steps: also save after that many steps.
        checkpoint_minutes: also save after that many minutes.
        tensorboard: also write scalars under tensorboard/ in the run folder.
        compile: compile the training step, which takes some seconds and then saves time at every step.
        products: the library of a compiled step's matrix products on the CPU: torch, onednn, or fastest, which measures
            both and records the faster one.
        resume: the folder of a run to resume; its settings are the defaults.
        folder: the run folder; by default ./runs/train-<time>.
        device: cpu, cuda, cuda:1, …; with several processes, cuda gives each its own GPU.
        trust: import the import paths in the config.yaml of a run; such code runs with your rights.
    """

    model: str = "gaussian-vae"
    guide: str | None = None
    estimator: dict[str, str] | str = "default"
    objective: str = "elbo"
    objective_options: dict[str, Any] = field(default_factory=dict)
    particles: int | None = None
    kl_weight: float | str = 1.0
    temperature: float | str | None = None
    data: str = "digits"
    binarize: str | None = "auto"
    model_options: dict[str, Any] = field(default_factory=dict)
    guide_options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    lr: float | str = 1e-3
    clip_norm: float | None = None
    anneal: dict[str, str | float] = field(default_factory=dict)
    epochs: int = 50
    batch_size: int = 128
    seed: int = 0
    patience: int | None = None
    until: str | None = None
    importance_samples: int = 100
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = None
    tensorboard: bool = False
    compile: bool = False
    products: str = "fastest"
    resume: str | None = None
    folder: str | None = None
    device: str = "cpu"
    trust: bool = False


def train(config: Train) -> dict[str, Any]:
    """Fit, evaluate on the test split, plot; returns the content of ``results.json``."""
    from gumbo.inference.training.locks import FolderLock
    from gumbo.inference.training.optimizers import OPTIMIZERS

    if config.optimizer not in OPTIMIZERS:
        raise UnknownName("optimizer", config.optimizer, OPTIMIZERS)
    check_least(config, particles=1, importance_samples=1)
    if config.resume is not None:
        recorded(config.resume)
        refuse_export(config.resume)
        if config.folder is not None and Path(config.folder).absolute() != Path(config.resume).absolute():
            raise BadInput(
                f"folder is {config.folder!r}, and a resumed run stays in its own, {config.resume!r}: leave out"
                " --folder, or copy the run and resume the copy"
            )
    device, processes = place(config)
    if processes is not None:
        processes.from_main(lambda: load_data(config) is None)  # one process downloads the data for all
    data = load_data(config)
    model, guide = (program.to(device) for program in build(config, data.data_shape))
    config = replace(config, guide=guide_of(config, model))  # the run records its guide
    if config.compile:
        from gumbo.inference.training.compile.products import choose_library

        library = choose_library(config.products, [model, guide], config.batch_size, device)
        config = replace(config, products=library)  # and the library of its products
    loss = make_loss(config)

    def folder() -> RunFolder:
        if config.resume is None:
            run = RunFolder.create("train", config, config.folder)
        else:
            run = RunFolder(Path(config.resume).absolute())
        locks.enter_context(FolderLock(run.path))
        return run

    with ExitStack() as locks:
        run = folder() if processes is None else processes.from_main(folder)
        with resumable(run, config):
            return train_into(run, config, data, model, guide, loss, processes)


def place(config: Train):
    """The device, and the processes of a launcher: None if there is only this one."""
    import torch

    from gumbo.inference.training.distributed import Processes

    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise BadInput(f"device {config.device!r} is unknown: expected cpu, cuda, cuda:1, …") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device {config.device!r} is not one that gumbo computes on: expected cpu, cuda, cuda:1, …")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device {config.device!r}: torch finds no GPU here")
    processes = Processes.join(device)
    return device if processes is None else processes.device, processes


def train_into(run: RunFolder, config: Train, data, model, guide, loss, processes) -> dict[str, Any]:
    from gumbo.inference import evaluate, fit

    result = fit(
        model,
        guide,
        rows_of(data, "train"),
        valid=inputs_of(model, data, "valid"),
        loss=loss,
        optimizer=config.optimizer,
        lr=learning_rate(config),
        clip_norm=config.clip_norm,
        anneal=config.anneal or None,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        run_dir=run.path,
        resume=config.resume is not None,
        patience=config.patience,
        until=config.until,
        restore_best=config.patience is not None,
        checkpoint_steps=config.checkpoint_steps,
        checkpoint_minutes=config.checkpoint_minutes,
        tensorboard=config.tensorboard,
        compile=config.compile,
        products=config.products,
        transform=lambda rows, generator: model.inputs(*data.batch(rows, generator)),
        title="gumbo train",
    )
    test = inputs_of(model, data, "test")
    options = {"num_samples": config.importance_samples, "seed": config.seed}
    found = evaluate(model, guide, test, **options, processes=processes)
    if not speaks():
        return {}  # the main process writes and draws
    results = {
        "config": asdict(config),
        "objective": result.objective_name,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "best_valid_elbo": result.best_elbo,
        "ms_per_step": result.ms_per_step,
        "test": found.as_dict(),
    }
    run.write_config("train", config, resume=None, folder=None, epochs=max(config.epochs, result.epochs))
    run.write_json("results.json", results)
    pictures = draw(run, result, model.cpu(), guide.cpu(), test)
    report(run, config, result, found, pictures)
    show("test", found)
    print(f"gumbo train: plots, numbers and report.html in {run.path}", file=sys.stderr)
    return results


@contextmanager
def resumable(run: RunFolder, config: Train) -> Iterator[None]:
    """Add the command to resume to an interruption; a run that has saved nothing leaves no folder behind."""
    try:
        yield
    except BaseException as error:
        if not speaks():
            raise
        if not run.saved():
            if config.resume is None:
                run.empty()
            raise
        if not isinstance(error, KeyboardInterrupt):
            raise
        command = "gumbo train" if launched() == 1 else f"the same launcher of {launched()} processes, -m gumbo train"
        how = f"; resume with: {command} --resume {os.path.relpath(run.path)} --epochs {config.epochs}"
        raise Interrupted(getattr(error, "signal", signal.SIGINT), getattr(error, "where", ""), how) from None


def learning_rate(config: Train):
    try:
        return float(config.lr)
    except ValueError:
        return schedule_of(config, "lr")


def schedule_of(config: Train, name: str) -> Schedule:
    """The schedule that a setting describes; an error names the setting."""
    from gumbo.inference.training.schedules import parse_rate, parse_schedule

    try:
        return (parse_rate if name == "lr" else parse_schedule)(getattr(config, name))
    except GumboError as error:
        raise BadInput(f"{name}: {error}") from error


def load_data(config: Train):
    from gumbo.experiments.data import load

    return load(config.data, binarize=config.binarize)


def rows_of(data, split: str) -> dict[str, Any]:
    """Images of a split, and their labels if any; the data set if rows are read on demand."""
    if split == "train" and data.rows is not None:
        return data.rows
    labels = {"labels": data.labels[split]} if split in data.labels else {}
    return {"images": getattr(data, split), **labels}


def inputs_of(model, data, split: str, count: int | None = None) -> dict[str, Any]:
    """The programs' arguments for the first ``count`` rows of a split."""
    rows = rows_of(data, split)
    if split == "train" and data.rows is not None:
        from gumbo.inference.engine.sources import Source

        images, labels = data.batch(Source(rows, f"dataset {data.name!r}").held())
        rows = {"images": images} | ({} if labels is None else {"labels": labels})
    rows = {name: value[:count] for name, value in rows.items()}
    return model.inputs(rows["images"], rows.get("labels"))


def make_loss(config: Train):
    from gumbo.inference import make_loss

    target = named_objective(config.objective, config.objective_options)
    options: dict[str, Any] = {} if target.name == "elbo" else {"objective": target}
    if str(config.kl_weight) not in ("1", "1.0"):
        options["kl_weight"] = schedule_of(config, "kl_weight")
    word: Any = config.estimator if target.takes_estimators else "default"
    with current_folder_importable():
        if config.temperature is not None:
            temperature = schedule_of(config, "temperature")
            if not 0 < temperature(0) < math.inf:
                given = f"{config.temperature:g}" if isinstance(config.temperature, float) else config.temperature
                raise BadInput(
                    f"temperature is {given}: expected a positive number, or a schedule that begins with one"
                )
            word = with_temperature(word, temperature)
        return make_loss(word, num_particles=config.particles, **options)


def with_temperature(word: Any, temperature: Any) -> Any:
    """The estimator, or those among several that have a temperature, with this temperature."""
    from gumbo.inference.engine.resolution import as_estimator

    if word == "default":
        raise BadInput("--temperature is of a relaxed estimator: name one too, as in --estimator gumbel-softmax")
    words = {site: as_estimator(one) for site, one in (word if isinstance(word, dict) else {"*": word}).items()}
    relaxed = [estimator for estimator in words.values() if hasattr(estimator, "temperature")]
    if not relaxed:
        raise BadInput(f"estimator {word!r} has no temperature: leave --temperature out")
    for estimator in relaxed:
        estimator.temperature = temperature
    return words if isinstance(word, dict) else words["*"]


def build(config: Train, data_shape: Sequence[int]):
    """The pair, with weights drawn from the run's seed."""
    import torch

    from gumbo.guides import guides
    from gumbo.models import models

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        own = own_model(models, config.model)
        if own is None:
            found = named(models, config.model)
            model = construct(found, config.model, "model", (tuple(data_shape),), config.model_options)
        else:
            if isinstance(own, type):
                own = construct(own, config.model, "model", (), config.model_options)
            elif config.model_options:
                raise BadInput(f"model {config.model!r} is no class that could take options: leave model_options out")
            model = OwnProgram(own, config.model)
        name = guide_of(config, model)
        if name == AMORTIZE:
            return model, amortized(model, inputs_of(model, load_data(config), "train", ROWS), config.guide_options)
        return model, construct(named(guides, name), name, "guide", (model,), config.guide_options)


def guide_of(config: Train, model) -> str:
    """The guide's name: the requested one, or the first that fits the model."""
    from gumbo.guides import fitting

    if config.guide is not None:
        return config.guide
    if isinstance(model, OwnProgram):
        return AMORTIZE
    found = fitting(model)
    if not found:
        raise BadInput(f"no registered guide fits model {config.model!r}: name one with --guide")
    return default_guide(model, found)


def default_guide(model, fit: Sequence[str]) -> str:
    """Among the guides that fit: one that takes labels if the model does, or the plain one of the latents' family."""
    from gumbo.guides import guides

    if model.label_site is not None:
        # Data with labels pass them to the guide too.
        labelled = [name for name in fit if model.label_site in inspect.signature(guides[name].forward).parameters]
        fit = labelled or fit
    family = next((latent.family for latent in model.latents.values()), None)
    return family if family in fit else fit[0]


def construct(make: Callable[..., Any], name: str, kind: str, positional: tuple, options: Mapping[str, Any]):
    """An object from its options; BadInput names an unknown option."""
    import torch

    known = [
        p.name
        for p in inspect.signature(make).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    known = known[len(positional) :]
    check_known(f"{kind} {name!r}", options, known)
    # Who has written the model as a function gives its guide in the same way.
    maker = kind == "guide" and inspect.isfunction(make)
    advice = "; --guide names a function that makes a guide of the model, not the guide itself" if maker else ""
    try:
        with current_folder_importable():  # options may be import paths, such as a prior's
            made = make(*positional, **options)
    except GumboError:
        raise
    except Exception as error:  # the class's own code
        raise BadInput(f"{kind} {name!r} cannot be made: {type(error).__name__}: {error}{advice}") from error
    if not isinstance(made, torch.nn.Module):
        wanted = "expected a module whose call is the Pyro program"
        raise BadInput(f"{kind} {name!r} makes {describe(made)}: {wanted}{advice}")
    return made


def draw(run: RunFolder, result, model, guide, inputs: Mapping[str, Any]) -> list[Path]:
    """Learning curve, and where the data are images reconstructions and draws from the model."""
    import numpy as np

    from gumbo.experiments.plots import has_mean, image_rows, learning_curves, prior_draws, reconstructions
    from gumbo.inference.posterior.parts import exact_pair

    curve = np.array([[numbers["valid_elbo"] for numbers in result.history]])
    title = "true ELBO on validation data"
    made = [learning_curves(run.plots / "learning_curve.png", {title: {"valid": curve}}, "nats per datum")]
    if model.x_is_given or model.observed != ("x",):
        return made  # the data are no images
    model, guide = exact_pair(model, guide)
    first = {name: value[:10] for name, value in inputs.items()}
    if not has_mean(model, first):
        return made
    rows = {"data": first["x"], "reconstruction": reconstructions(model, guide, first)}
    drawn = "test data, and means of p(x | z) at a draw of the guide"
    title = "means of p(x | z) at draws of the prior"
    return [
        *made,
        image_rows(run.plots / "reconstructions.png", drawn, rows),
        image_rows(run.plots / "prior_draws.png", title, {"": prior_draws(model, first)}),
    ]


def report(run: RunFolder, config: Train, result, found: Evaluation, pictures: Sequence[Path]) -> None:
    """``report.html``: the verdict, the numbers, the curves, the pictures."""
    from gumbo.experiments._report import Report, finish

    page = Report(
        f"gumbo train: {config.model} with guide {config.guide}",
        f"After {result.epochs} epochs the true ELBO on the test data is {found.elbo:.2f} nats per datum.",
    )
    page.result("Numbers on the test data", found)
    names = {result.objective_name: f"training: {result.objective_name}", "valid_elbo": "validation: true ELBO"}
    curves = {
        label: [(line["epoch"], line[name]) for line in result.history if line.get(name) is not None]
        for name, label in names.items()
    }
    page.curves("Learning curves", curves, "epoch", "nats per datum")
    finish(run, page, pictures)


def show(split: str, found: Evaluation) -> None:
    """The numbers of an evaluation, on standard output."""
    print(f"{split}: {found}")


def settings_of(run: str, trust: bool = False) -> dict[str, Any]:
    """The settings of a run of ``gumbo train``, from its ``config.yaml``, which is data and not code.

    Raises BadInput for a folder that is no run, and for import paths in it unless ``trust`` is True.
    """
    found = recorded(run)
    if not trust:
        refuse_untrusted(found, Path(run) / "config.yaml")
    return found


def recorded(run: str) -> dict[str, Any]:
    """The content of ``config.yaml``, with any names."""
    found = run_settings(run, "train", Train)
    return found | {"folder": None, "resume": None, "trust": False}


def refuse_export(run: str) -> None:
    """Raise BadInput for an export: a training in its folder would begin anew, beside the exported parameters."""
    folder = RunFolder(Path(run))
    if (folder.path / WEIGHTS).exists() and not folder.saved():
        raise BadInput(
            f"{run} is an export, which has no training state: resume the run that it was made of, or train on with "
            "fit from gumbo.load"
        )


def resumed(run: str) -> dict[str, Any]:
    """The defaults of ``--resume RUN``; the import paths among them are marked as the run's."""
    return {name: value for name, value in marked(recorded(run)).items() if name not in ("folder", "resume")}


def main(argv: Sequence[str] | None = None, prog: str = "gumbo train") -> None:
    run_command(Train, train, argv, prog, presets={"resume": resumed}, several=True)


if __name__ == "__main__":
    main()

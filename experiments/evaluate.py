"""``gumbo evaluate RUN``: evaluate a run of ``gumbo train`` on a split of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments._command import check_least, checked, run_command
from gumbo.experiments._loading import load_parameters
from gumbo.experiments._runs import RunFolder
from gumbo.experiments.train import Train, build, inputs_of, load_data, settings_of, show


@dataclass
class OfRun:
    """A run of ``gumbo train``, opened again.

    Args:
        run: the run's folder.
        split: train, valid or test.
        seed: of the draws.
        best: load the parameters of the best epoch instead of the last.
        trust: import the import paths in the run's config.yaml; such code runs with your rights.
    """

    run: str
    split: str = "test"
    seed: int = 0
    best: bool = False
    trust: bool = False


@dataclass
class Evaluate(OfRun):
    """Evaluate a run of `gumbo train`: bound, evidence and information in the latents, in nats per datum.

    Args:
        importance_samples: draws per datum.
    """

    importance_samples: int = 1000


def reopened(config: OfRun, verb: str) -> tuple[Train, RunFolder, Any, Any, Any]:
    """The settings, the folder, the data, and the trained model and guide.

    Nothing that only the run's config.yaml names is imported unless ``config.trust`` is True.
    """
    folder, split = config.run, config.split
    if split not in ("train", "valid", "test"):
        raise UnknownName("split", split, ("train", "valid", "test"))
    settings = checked(Train, settings_of(folder, config.trust), Path(folder) / "config.yaml")
    run = RunFolder(Path(folder))
    run.check_writable()
    data = load_data(settings)
    model, guide = build(settings, data.data_shape)
    load_parameters(model, guide, run, settings, config.best or None)
    if split == "train" and settings.binarize == "dynamic":
        raise BadInput(f"the train split is drawn again in each epoch under dynamic binarization: {verb} valid or test")
    return settings, run, data, model, guide


def evaluate(config: Evaluate) -> dict[str, Any]:
    """The numbers, also written to ``evaluation-<split>.json`` in the run's folder."""
    from gumbo.inference import evaluate as judge

    check_least(config, importance_samples=1)
    settings, run, data, model, guide = reopened(config, "evaluate")
    judged = judge(
        model, guide, inputs_of(model, data, config.split), num_samples=config.importance_samples, seed=config.seed
    )
    found = judged.as_dict()
    show(config.split, judged)
    more = {}
    if model.latents:
        more = judged.information.as_dict()
        show_information(more)
    run.write_json(f"evaluation-{config.split}.json", {"config": asdict(config), **found, **more})
    return found


def show_information(found: dict[str, Any]) -> None:
    """Print the information of the latents about the data."""
    for site, kl in found["kl"].items():
        numbers = flat(kl)
        active = f", {found['active_units'][site]} active" if site in found["active_units"] else ""
        shown = " ".join(f"{value:.2f}" for value in sorted(numbers, reverse=True)[:10])
        rest = " …" if len(numbers) > 10 else ""
        print(f"  KL of {site}  {sum(numbers):9.3f} in {len(numbers)} dimensions{active}: {shown}{rest}")
    for site, note in found["notes"].items():
        print(f"  {site}: {note}")
    if found["mutual_information"] is not None:
        print(f"  I(x; z)    {found['mutual_information']:9.3f}")


def flat(numbers: Any) -> list[float]:
    """The numbers of nested lists."""
    return [one for part in numbers for one in flat(part)] if isinstance(numbers, list) else [numbers]


def main(argv: Sequence[str] | None = None, prog: str = "gumbo evaluate") -> None:
    run_command(Evaluate, evaluate, argv, prog)


if __name__ == "__main__":
    main()

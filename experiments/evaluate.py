"""``gumbo evaluate RUN``: judge a run of ``gumbo train`` on a split of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments._command import run_command
from gumbo.experiments._runs import RunFolder
from gumbo.experiments.train import Train, build, inputs_of, load_data, settings_of, show


@dataclass
class Evaluate:
    """Judge a run of `gumbo train`: ELBO, importance-weighted log p(x), rate and distortion, in nats per datum.

    Args:
        run: the run's folder.
        split: train, valid or test.
        importance_samples: draws a datum.
        seed: of those draws.
        best: take the parameters of the best epoch rather than of the last.
    """

    run: str
    split: str = "test"
    importance_samples: int = 1000
    seed: int = 0
    best: bool = False


def evaluate(config: Evaluate) -> dict[str, Any]:
    """The numbers, also written to ``evaluation-<split>.json`` in the run's folder."""
    from pathlib import Path

    from gumbo.inference import evaluate as judge

    if config.split not in ("train", "valid", "test"):
        raise UnknownName("split", config.split, ("train", "valid", "test"))
    settings = Train(**settings_of(config.run))
    run = RunFolder(Path(config.run))
    data = load_data(settings)
    model, guide = build(settings, data.data_shape)
    load_parameters(model, guide, run, best=config.best or settings.patience is not None)
    if config.split == "train" and settings.binarize == "dynamic":
        raise BadInput("the train split is drawn anew each epoch under dynamic binarization: evaluate valid or test")
    found = judge(
        model, guide, inputs_of(model, data, config.split), num_samples=config.importance_samples, seed=config.seed
    ).as_dict()
    show(config.split, found)
    run.write_json(f"evaluation-{config.split}.json", {"config": asdict(config), **found})
    return found


def load_parameters(model, guide, run: RunFolder, best: bool) -> None:
    """Give the pair what the run's checkpoint holds."""
    from gumbo.inference.checkpoints import load_checkpoint

    state = load_checkpoint(run.checkpoints / "last.pt")
    module = state["best"]["module"] if best else state["module"]
    for prefix, program in (("model.", model), ("guide.", guide)):
        weights = {key.removeprefix(prefix): value for key, value in module.items() if key.startswith(prefix)}
        try:
            program.load_state_dict(weights)
        except RuntimeError as error:
            raise BadInput(f"{run.path}: the checkpoint does not fit config.yaml ({error})") from error


def main(argv: Sequence[str] | None = None, prog: str = "gumbo evaluate") -> None:
    run_command(Evaluate, evaluate, argv, prog)


if __name__ == "__main__":
    main()

"""The results of ``gumbo train`` as Python objects: programs, loss, settings and metrics."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gumbo.errors import BadInput, GumboWarning, shortened
from gumbo.experiments._command import checked
from gumbo.experiments._runs import WEIGHTS, RunFolder
from gumbo.experiments.train import Train, build, guide_of, inputs_of, load_data, make_loss, settings_of

BUFFERS = "buffers"  # in its metadata: the buffers that state_dict leaves out, and that the training has changed


class LoadedRun(NamedTuple):
    """A run of ``gumbo train``, or an export of one.

    Attributes: ``model`` and ``guide``, in evaluation mode, with the trained parameters; ``loss``, the ``SiteELBO`` (or
    Pyro's ELBO) of the training, whose schedules and baselines continue; ``settings``, the run's resolved
    :class:`~gumbo.experiments.train.Train`; ``metrics``, a dict per epoch as in ``metrics.jsonl``.
    """

    model: Any
    guide: Any
    loss: Any
    settings: Train
    metrics: list[dict[str, Any]]

    def inputs(self, split: str = "test", count: int | None = None) -> dict[str, Any]:
        """The programs' arguments for the first ``count`` rows of a split of the run's own data, as keywords."""
        return inputs_of(self.model, load_data(self.settings), split, count)

    def __repr__(self) -> str:
        guide, epochs = self.settings.guide, len(self.metrics)
        return f"LoadedRun({self.settings.model}, {guide}, {self.settings.data}, {epochs} lines of metrics)"


def load(run: str | Path, trust: bool = False, best: bool | None = None) -> LoadedRun:
    """A run of ``gumbo train`` (or an export of one), for calls of its programs, ``to_arviz`` and further training.

    ``fit(run.model, run.guide, data, loss=run.loss)`` continues from the loaded parameters with a new optimizer and the
    saved step of KL weights and temperatures; ``gumbo train --resume`` continues to the same bits. A run folder is
    data: nothing that only its ``config.yaml`` names is imported unless ``trust`` is True.

    Args:
        run: the folder of a run or of an export.
        trust: import the import paths in the run's config.yaml; such code runs with your rights.
        best: load the parameters of the best epoch instead of the last; None does so for a run with ``patience``.

    Returns:
        A :class:`LoadedRun`, which unpacks into ``model, guide, loss, settings, metrics``.

    Raises:
        BadInput: no run folder; import paths in it without ``trust``; parameters that are damaged, missing or of other
            programs.

    >>> import contextlib, io
    >>> import gumbo
    >>> from gumbo.experiments.train import Train, train
    >>> asked = Train(epochs=1, batch_size=400, importance_samples=2, model_options={"hidden": [8]}, folder="run")
    >>> with contextlib.redirect_stdout(io.StringIO()):
    ...     _ = train(asked)
    >>> run = gumbo.load("run")
    >>> run.settings.guide, len(run.metrics), run.loss(run.model, run.guide)(**run.inputs("test", 10)).shape
    ('normal', 2, torch.Size([]))
    """
    settings = checked(Train, settings_of(str(run), trust), Path(run) / "config.yaml")
    folder = RunFolder(Path(run))
    shape = exported_shape(folder)
    model, guide = build(settings, load_data(settings).data_shape if shape is None else shape)
    loss = make_loss(settings)
    rest = load_parameters(model, guide, folder, settings, best)
    if rest and hasattr(loss, "begins_with"):
        loss.begins_with = rest
    settings = replace(settings, guide=guide_of(settings, model))
    return LoadedRun(model.eval(), guide.eval(), loss, settings, folder.read_metrics())


def load_parameters(
    model: torch.nn.Module, guide: torch.nn.Module, run: RunFolder, settings: Train, best: bool | None
) -> dict[str, Any]:
    """Load the checkpoint of a run, or its export, into the pair; returns the state of the loss.

    ``best=None`` loads the best epoch for a run with ``patience``.
    """
    if (run.path / WEIGHTS).exists():
        if best:
            raise BadInput(f"{run.path} is an export, which holds one set of parameters: leave out best")
        load_weights(model, guide, run.path / WEIGHTS)
        warn_of_not_finite(run, model, guide)
        return {}
    from gumbo.inference.training.steps import load_unsaved

    module, buffers = parameters_of(run, settings.patience is not None if best is None else best)
    for prefix, program in (("model.", model), ("guide.", guide)):
        weights = {key.removeprefix(prefix): value for key, value in module.items() if key.startswith(prefix)}
        warn_of_other_types(run, prefix, program, weights)
        try:
            program.load_state_dict(weights)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise BadInput(f"{run.path}: the checkpoint does not fit config.yaml ({error})") from error
    try:
        load_unsaved({"model": model, "guide": guide}, buffers)
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise BadInput(f"{run.path}: the checkpoint's buffers do not fit config.yaml ({error})") from error
    warn_of_not_finite(run, model, guide)
    return {key.removeprefix("binding."): value for key, value in module.items() if key.startswith("binding.")}


def warn_of_other_types(run: RunFolder, prefix: str, program: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    """Warn of tensors that loading converts to another type."""
    for name, value in program.state_dict().items():
        saved = weights.get(name)
        if isinstance(value, torch.Tensor) and isinstance(saved, torch.Tensor) and saved.dtype != value.dtype:
            warnings.warn(
                f"{run.path}: {prefix}{name} was saved as {saved.dtype} and is {value.dtype} here, so that values are "
                "rounded: make the programs as the run did (torch.set_default_dtype)",
                GumboWarning,
                stacklevel=4,
            )
            return


def warn_of_not_finite(run: RunFolder, model: torch.nn.Module, guide: torch.nn.Module) -> None:
    """Warn of parameters that are not finite, which ``fit`` saves in no run."""
    programs = (("model", model), ("guide", guide))
    named = [(f"{prefix}.{name}", value) for prefix, program in programs for name, value in program.named_parameters()]
    if wrong := [name for name, value in named if not torch.isfinite(value).all()]:
        warnings.warn(
            f"{run.path}: {shortened(wrong, 1)} has values that are not finite: the file was not written by gumbo, or "
            "was changed, and numbers of these programs are NaN",
            GumboWarning,
            stacklevel=4,
        )


def parameters_of(run: RunFolder, best: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state of the modules in the run's checkpoint by name, and the buffers that it leaves out."""
    from gumbo.inference.training.checkpoints import Checkpoints

    state = Checkpoints(run.checkpoints).load()
    if best:
        state = state["best"] if isinstance(state.get("best"), dict) else {}
    module, buffers = state.get("module"), state.get("buffers", {})  # an earlier version may not have kept these
    if not isinstance(module, dict) or not isinstance(buffers, dict) or not all(isinstance(key, str) for key in module):
        raise BadInput(f"{run.path}: its checkpoint is of something else than gumbo train")
    if best and not module:
        raise BadInput(f"{run.path} has no best epoch: its run had no validation data")
    return module, buffers


def safetensors() -> Any:
    """The package safetensors, an extra; raises BadInput if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise BadInput('exports need safetensors: pip install -e ".[export]" in the checkout') from error
    return safetensors.torch


def save_weights(run: LoadedRun, path: Path, unsaved: list[str], **said: str) -> None:
    """Write both programs' tensors to one file as ``model.…`` and ``guide.…``, tied ones once.

    ``unsaved`` are the names of buffers to write that ``state_dict`` leaves out.
    """
    from gumbo import __version__

    shape = getattr(run.model, "config", {}).get("data_shape") or load_data(run.settings).data_shape
    metadata = {"format": "pt", "gumbo": __version__, "data_shape": json.dumps(list(shape)), **said}
    both = _together(run.model, run.guide)
    if unsaved:
        metadata[BUFFERS] = json.dumps(unsaved)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _saved_too(both, unsaved):
            safetensors().save_model(both, str(partial), metadata=metadata)
        os.replace(partial, path)
    except Exception as error:  # safetensors' own error on a full disk, and on state that is no tensor
        partial.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({' '.join(str(error).split())})") from error


def load_weights(model: torch.nn.Module, guide: torch.nn.Module, path: Path) -> None:
    """Load a file of :func:`save_weights` into the pair."""
    library = safetensors()
    from safetensors import safe_open

    from gumbo.inference.training.steps import load_unsaved

    try:
        with safe_open(str(path), framework="pt") as file:
            unsaved = json.loads((file.metadata() or {}).get(BUFFERS, "[]"))
            load_unsaved({"model": model, "guide": guide}, {name: file.get_tensor(name) for name in unsaved})
        both = _together(model, guide)
        with _saved_too(both, unsaved):
            library.load_model(both, str(path))
    except Exception as error:  # safetensors' own error on a damaged file, and torch's on shapes
        raise BadInput(f"{path} does not fit config.yaml, or is damaged ({' '.join(str(error).split())})") from error


def _together(model: torch.nn.Module, guide: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict({"model": model, "guide": guide})


@contextmanager
def _saved_too(both: torch.nn.Module, names: list[str]) -> Iterator[None]:
    """Let ``state_dict`` hold these buffers, which it leaves out otherwise."""
    places = [(both.get_submodule(path), own) for path, _, own in (name.rpartition(".") for name in names)]
    for module, own in places:
        module._non_persistent_buffers_set.discard(own)
    try:
        yield
    finally:
        for module, own in places:
            module._non_persistent_buffers_set.add(own)


def exported_shape(run: RunFolder) -> tuple[int, ...] | None:
    """The shape of a datum for which an export was made; None if the folder is no export."""
    path = run.path / WEIGHTS
    if not path.exists():
        return None
    safetensors()
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            said: Mapping[str, str] = file.metadata() or {}
        shape = json.loads(said.get("data_shape", ""))
    except Exception as error:  # safetensors' own error on a damaged file
        raise BadInput(f"{path} is damaged, or no export of gumbo ({' '.join(str(error).split())})") from error
    if not (isinstance(shape, list) and all(isinstance(size, int) and 0 < size < 2**31 for size in shape)):
        raise BadInput(f"{path} is no export of gumbo: its data_shape is {shape!r}")
    return tuple(shape)

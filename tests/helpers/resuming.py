"""Small runs, and what it means that two of them ended alike."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import word_programs

from gumbo.guides import BernoulliGuide, CategoricalGuide, NormalGuide
from gumbo.inference import fit
from gumbo.inference.training.checkpoints import load_checkpoint
from gumbo.models import BernoulliVAE, CategoricalVAE, GaussianVAE

SHAPE = (1, 3, 3)
TIMES = ("ms_per_step", "seconds")

# 40 rows in batches of 16: three steps an epoch, the last of them of eight rows.
quiet = functools.partial(fit, progress=False, batch_size=16, lr=1e-2)


def images(rows: int = 40, seed: int = 0, kind: str = "categorical") -> torch.Tensor:
    if kind in word_programs.KINDS:
        return word_programs.rows(rows, seed)
    return torch.bernoulli(torch.full((rows, *SHAPE), 0.4), generator=torch.Generator().manual_seed(seed))


def pair(kind: str = "categorical", seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "categorical":
            model = CategoricalVAE(SHAPE, num_latents=2, num_classes=3, hidden=(6,))
            return model, CategoricalGuide(model, hidden=(6,))
        if kind in word_programs.KINDS:
            return word_programs.pair(kind, seed)
        if kind == "bernoulli":
            model = BernoulliVAE(SHAPE, num_latents=3, hidden=(6,))
            return model, BernoulliGuide(model, hidden=(6,))
        model = GaussianVAE(SHAPE, latent_dim=2, hidden=(6,))
        return model, NormalGuide(model, hidden=(6,))


def weights(*programs: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for program in programs for parameter in program.parameters()])


def without_times(value: Any) -> Any:
    """A checkpoint's content without what a clock has put there."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in (*TIMES, "took")}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first place where two nested values are not the same to the last bit."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return None if same else where
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} parts"
        pairs = [(index, *both) for index, both in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{where}: {one} and {other}"
    return next((found for key, a, b in pairs if (found := difference(a, b, f"{where}/{key}"))), None)


def assert_alike(one: Path, other: Path) -> None:
    """Two run folders hold the same parameters, optimizer, random state, baselines and metrics, bit for bit."""
    states = [without_times(load_checkpoint(folder / "checkpoints" / "last.pt")) for folder in (one, other)]
    assert len(states[0]["module"]) > 4
    assert difference(*states) is None
    best = [folder / "checkpoints" / "best.pt" for folder in (one, other)]
    assert best[0].exists() == best[1].exists()
    if best[0].exists():
        assert difference(*(load_checkpoint(path) for path in best)) is None
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    assert lines[0] and difference(*([without_times(json.loads(line)) for line in file] for file in lines)) is None


class After:
    """A transform that does something at its n-th call, here a call for a batch; used to stop a run in mid-epoch."""

    def __init__(self, calls: int, act):
        self.calls, self.act = calls, act

    def __call__(self, rows, generator: torch.Generator):
        self.calls -= 1
        if self.calls == 0:
            self.act()
        # Noise of its own, so that a batch drawn from another place of the stream would show.
        return torch.where(torch.rand(rows.shape, generator=generator) < 0.05, 1 - rows, rows)

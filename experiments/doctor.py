"""``gumbo doctor``: installed versions, devices and data, and a short self-test."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gumbo.experiments._command import run_command
from gumbo.experiments._runs import environment
from gumbo.tables import plain

# Optional packages by import name, with their install commands.
EXTRAS = {
    "zuko": "pip install zuko (guides by flows)",
    "accelerate": 'pip install -e ".[distributed]"',
    "safetensors": 'pip install -e ".[export]"',
    "tensorboard": 'pip install -e ".[tensorboard]"',
    "shtab": 'pip install -e ".[completion]"',
}
FAILED = 1


@dataclass
class Doctor:
    """Show versions, devices and data, and run a self-test of some ten seconds.

    Args:
        json: everything as JSON.
    """

    json: bool = False


def an_estimator_is_exact() -> str:
    """The gradient of rloo, over many draws, against the exact one."""
    import pyro
    import pyro.distributions as dist
    import torch

    from gumbo.inference import SiteELBO

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * a), obs=torch.tensor(1.0))

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

        def forward(self):
            pyro.sample("a", dist.Bernoulli(logits=self.logit))

    found = {}
    for word in ("enumerate", "rloo"):
        guide = Guide()
        loss = SiteELBO(word, num_particles=20_000 if word == "rloo" else None)(model, guide)
        loss().backward()
        found[word] = guide.logit.grad.item()
    away = abs(found["rloo"] - found["enumerate"])
    if not away < 0.02:  # some ten standard errors
        raise AssertionError(f"rloo's gradient is {found['rloo']:.3f} where {found['enumerate']:.3f} is exact")
    return f"rloo {found['rloo']:.4f}, exact {found['enumerate']:.4f}"


def a_model_trains() -> str:
    """Two epochs on the digits."""
    from gumbo.experiments.data import load
    from gumbo.guides import NormalGuide
    from gumbo.inference import SiteELBO, evaluate, fit
    from gumbo.models import GaussianVAE

    data = load("digits", binarize="static", splits=("train",))
    model = GaussianVAE(data_shape=data.data_shape, latent_dim=4, hidden=[32])
    guide = NormalGuide(model, hidden=[32])
    before = evaluate(model, guide, data.train[:200], num_samples=5).elbo
    fit(model, guide, data.train, loss=SiteELBO("pathwise"), lr=3e-3, epochs=2, batch_size=64, progress=False)
    after = evaluate(model, guide, data.train[:200], num_samples=5).elbo
    if not after > before:
        raise AssertionError(f"the bound went from {before:.1f} to {after:.1f} nats per datum")
    return f"ELBO {before:.1f} to {after:.1f} nats per datum"


def a_posterior_lands_in_arviz() -> str:
    """A conjugate posterior at the exact guide, judged by its Pareto k."""
    import pyro
    import pyro.distributions as dist
    import torch

    from gumbo.inference import to_arviz

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))

    found = to_arviz(model, guide, torch.tensor([0.5, 1.5, 1.0]), num_samples=500)
    mean = float(found["posterior"]["z"].mean())
    if not math.isclose(mean, 0.75, abs_tol=0.15):
        raise AssertionError(f"the posterior mean is {mean:.2f} where 0.75 is exact")
    return f"posterior mean {mean:.2f}, exact 0.75"


CHECKS: dict[str, Callable[[], str]] = {
    "an estimator against the exact gradient": an_estimator_is_exact,
    "training on the digits": a_model_trains,
    "a posterior in ArviZ": a_posterior_lands_in_arviz,
}


def checked(check: Callable[[], str]) -> dict[str, Any]:
    """The message of a check, whether it passed, and its seconds, without global side effects."""
    import pyro
    import torch

    began = time.perf_counter()
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        try:
            said, passed = check(), True
        except Exception as error:  # whatever is wrong with this installation is what is asked for
            said, passed = f"{type(error).__name__}: {' '.join(str(error).split())}", False
    return {"passed": passed, "said": said, "seconds": round(time.perf_counter() - began, 1)}


def findings() -> dict[str, Any]:
    """Everything that is shown."""
    import torch

    from gumbo.experiments.data import data_folder

    found = {name: value for name, value in environment().items() if name not in ("command", "time")}
    folder = data_folder()
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return {
        "versions and machine": found,
        "extras": {name: "installed" if importlib.util.find_spec(name) else hint for name, hint in EXTRAS.items()},
        "devices": ["cpu", *(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))],
        "data": {"folder": str(folder), "exists": folder.is_dir(), "files": files},
        "self-test": {name: checked(check) for name, check in CHECKS.items()},
    }


def doctor(config: Doctor) -> dict[str, Any]:
    """Show the findings; exit status 1 where a check failed."""
    found = findings()
    print(json.dumps(found, indent=1) if config.json else report(found))
    if not all(result["passed"] for result in found["self-test"].values()):
        broken = [name for name, result in found["self-test"].items() if not result["passed"]]
        print(f"gumbo doctor: error: the self-test failed: {'; '.join(broken)}", file=sys.stderr)
        raise SystemExit(FAILED)
    return found


def report(found: dict[str, Any]) -> str:
    """The findings as text of 80 columns."""
    versions = [[name, str(value)[:56]] for name, value in found["versions and machine"].items()]
    data, tests = found["data"], found["self-test"]
    files = ", ".join(data["files"][:6]) + (" …" if len(data["files"]) > 6 else "") if data["files"] else "nothing"
    lines = [
        *plain(["what", "version"], versions, left=2),
        "",
        *plain(["extra", "state"], [list(row) for row in found["extras"].items()], left=2),
        "",
        f"devices: {', '.join(found['devices'])}",
        f"data: {data['folder']} {'holds ' + files if data['exists'] else 'does not exist'}",
        "      (GUMBO_DATA names another folder; the digits come with scikit-learn)",
        "",
    ]
    for name, result in tests.items():
        lines.append(f"{'ok    ' if result['passed'] else 'FAILED'} {name}: {result['said']} ({result['seconds']} s)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, prog: str = "gumbo doctor") -> None:
    run_command(Doctor, doctor, argv, prog)


if __name__ == "__main__":
    main()

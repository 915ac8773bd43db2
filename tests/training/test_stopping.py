"""Training that knows when it is done: patience that waits for schedules, iterates that converge."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from resuming import difference, images, pair, quiet, without_times
from torch import nn

from gumbo.errors import BadInput, UnknownName
from gumbo.inference import Cosine, Exponential, Linear, SiteELBO, fit
from gumbo.inference.estimators import GumbelSoftmax
from gumbo.inference.training import convergence
from gumbo.inference.training import trainer as runs
from gumbo.inference.training.checkpoints import load_checkpoint
from gumbo.inference.training.convergence import Convergence, effective_number, split_rhat
from gumbo.inference.training.schedules import end_of

# --- patience ---------------------------------------------------------------------------------------------------------


def worsening(monkeypatch) -> None:
    """Validation whose first number is the best."""
    calls = iter(range(1000))
    monkeypatch.setattr(runs.Run, "_validate", lambda self: {"valid_elbo": -float(next(calls))})


@pytest.mark.parametrize(
    ("loss", "epochs"),
    [
        ("pathwise", 2),  # without a schedule: two epochs after the best, which is that before the first step
        (SiteELBO(kl_weight=Linear(9)), 5),  # three steps an epoch: warm after epoch 3, two more
        (SiteELBO(kl_weight=lambda step: min(1.0, step / 6)), 4),
        (SiteELBO(kl_weight=0.5), 2),
    ],
)
def test_patience_counts_from_the_end_of_the_kl_warm_up(loss, epochs, monkeypatch, capsys):
    worsening(monkeypatch)
    result = fit(*pair("normal"), images(), valid=images(10, 1), loss=loss, epochs=20, patience=2, batch_size=16)
    assert result.stopped_early and result.epochs == epochs
    assert ("stopping is considered from step" in capsys.readouterr().err) == (epochs > 2)


def test_patience_waits_for_a_temperature_that_the_guides_site_names(monkeypatch):
    worsening(monkeypatch)
    cooling = GumbelSoftmax(Exponential(1.0, 0.5, math.log(2) / 12))
    options = {"valid": images(10, 1), "epochs": 20, "patience": 2}
    assert quiet(*pair("categorical"), images(), loss=SiteELBO(cooling), **options).epochs == 6
    model, guide = pair("categorical")
    marked = pyro.poutine.infer_config(guide, config_fn=lambda site: {"estimator": cooling})

    class Marked(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder_inside = guide

        def forward(self, x):
            return marked(x)

    worsening(monkeypatch)
    assert quiet(model, Marked(), images(), loss=SiteELBO(), **options).epochs == 6


def test_a_schedule_that_never_ends_is_waited_for():
    assert end_of(lambda step: step, 40) == 40 and end_of(Cosine(30), 1000) == 30


# --- R-hat and effective numbers --------------------------------------------------------------------------------------


def autoregressive(phi: float, count: int, coordinates: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, coordinates, generator=generator, dtype=torch.float64)
    rows = [noise[0] / (1 - phi**2) ** 0.5]
    for step in noise[1:]:
        rows.append(phi * rows[-1] + step)
    return torch.stack(rows)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_the_effective_number_of_an_autoregression_is_the_closed_form(phi):
    found = effective_number(autoregressive(phi, 4000, 64)) / 4000
    exact = (1 - phi) / (1 + phi)
    error = found.std().item() / 8
    assert abs(found.mean().item() - exact) < 5 * error + 0.02 * exact  # Geyer's cut biases by a per cent or so


def test_rhat_tells_drift_from_stationarity():
    still = autoregressive(0.5, 2000, 50)
    assert split_rhat(still).max() < 1.02
    drift = still + torch.linspace(0, 5, 2000, dtype=torch.float64)[:, None]
    assert split_rhat(drift).min() > 1.2
    assert split_rhat(torch.ones(10, 1)).item() == 1.0


def test_iterates_are_thinned_and_the_average_is_of_every_step():
    value = nn.Parameter(torch.zeros(3))
    watch = Convergence({"value": value})
    watch._average = {"value": torch.zeros(3, dtype=torch.float64)}
    for step in range(2500):
        value.data = torch.full((3,), float(step))
        watch.after_step()
    assert len(watch._kept) <= 1000 and watch._stride == 4
    assert [one[0].item() for one in watch._kept[:3]] == [3.0, 7.0, 11.0]
    watch.take_average()
    assert torch.allclose(value, torch.full((3,), 2499 / 2))


# --- convergence ------------------------------------------------------------------------------------------------------

DATA = torch.linspace(-1.0, 3.0, 20)
EXACT = (DATA.sum() / (len(DATA) + 1)).item(), (len(DATA) + 1) ** -0.5


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(-3.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


def converge(guide, epochs: int = 20_000, **options):
    settings = {"loss": Trace_ELBO(), "lr": 0.05, "optimizer": "adam", "batch_size": 20, "until": "converged"}
    return fit(model, guide, DATA, epochs=epochs, **settings | options)


def test_iterates_converge_and_their_average_is_the_result(capsys):
    guide = Guide()
    result = converge(guide)
    said = capsys.readouterr().err
    assert result.converged and result.stopped_early and result.epochs < 20_000
    last = result.history[-1]
    assert last["mcse"] <= 0.02 and last["ess"] >= 50 and last["rhat"] <= 1.2
    assert "stationary at step" in said and f"{last['mcse']:.3g}" in said.splitlines()[-1]
    # Adam's average lies within its own Monte Carlo error, and a small bias of the noise, of the exact posterior.
    assert abs(guide.loc.item() - EXACT[0]) < 0.05
    assert abs(guide.log_scale.item() - math.log(EXACT[1])) < 0.1


def test_a_run_that_has_not_converged_says_so_with_its_numbers(capsys):
    result = converge(Guide(), epochs=300, lr=1e-3)
    said = capsys.readouterr().err.splitlines()[-1]
    assert result.converged is False and not result.stopped_early
    assert "not converged after 300 steps" in said and "largest R̂" in said and "loc" in said


def test_convergence_waits_for_the_kl_warm_up(capsys):
    loss = SiteELBO("pathwise", kl_weight=Linear(500))
    result = converge(Guide(), epochs=600, loss=loss)
    assert not any("rhat" in numbers for numbers in result.history)
    assert "fewer than 200 steps" in capsys.readouterr().err


def test_convergence_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    for name, number in (("TOLERANCE", 0.1), ("ENOUGH", 5.0), ("SHORTEST", 60)):
        monkeypatch.setattr(convergence, name, number)
    options = {"progress": False, "checkpoint_every": 25}
    whole = converge(Guide(), run_dir=tmp_path / "whole", **options)
    stops = [55, whole.epochs - 20]  # before anything is averaged, and in the middle of the average
    assert whole.converged and stops[0] + 60 < stops[1]
    guide = Guide()
    for epoch in stops:

        def stop(numbers, epoch=epoch):
            if numbers["epoch"] == epoch:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            converge(guide, run_dir=tmp_path / "parts", resume=True, on_epoch=stop, **options)
        guide = Guide()
    parts = converge(guide, run_dir=tmp_path / "parts", resume=True, **options)
    assert parts.converged and parts.epochs == whole.epochs
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts")]
    assert difference(*map(without_times, states)) is None
    kept = states[1]["module"]
    assert torch.equal(kept["guide.loc"], guide.loc) and torch.equal(kept["guide.log_scale"], guide.log_scale)
    again = converge(Guide(), run_dir=tmp_path / "parts", resume=True, **options)
    assert again.converged and again.epochs == whole.epochs  # there is nothing left to do


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"until": "bored"}, "converged"),
        ({"lr": Cosine(10)}, "constant learning rate"),
        ({"scheduler": lambda optimizer: None}, "constant learning rate"),
        ({"restore_best": True, "valid": DATA}, "choose one"),
    ],
)
def test_what_cannot_be_meant_is_one_line(options, words):
    with pytest.raises((BadInput, UnknownName), match=words) as found:
        converge(Guide(), **options)
    assert "\n" not in str(found.value)

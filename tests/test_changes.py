"""A changed meaning is announced once in a process, where a program meets it, for one version."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import gumbo
from gumbo import changes
from gumbo.errors import GumboWarning, MeaningChanged
from gumbo.inference import SiteELBO, evaluate

X = torch.tensor([0.5, 1.5, 1.0])


@pytest.fixture(autouse=True)
def unannounced(monkeypatch):
    monkeypatch.setattr(changes, "_announced", set())


def shared(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_guide(x):
    pyro.sample("z", dist.Normal(0.75, 0.5))


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def mixing(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)


class Bits(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logit))


def warned(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in found if issubclass(one.category, MeaningChanged)]


def test_the_evidence_of_global_latents_is_announced_once_and_where_it_is_read():
    found = evaluate(shared, shared_guide, X, num_samples=2000)
    assert warned(lambda: (found.elbo, found.log_predictive, found.values, found.khat)) == []
    (said,) = warned(lambda: (found.log_evidence, found.log_evidence, str(found)))
    assert said.startswith("the meaning of log_evidence changed in 0.1: ") and "log_predictive" in said
    assert warned(lambda: evaluate(shared, shared_guide, X).log_evidence) == []


def test_the_evidence_of_local_latents_means_what_it_did():
    assert warned(lambda: evaluate(local, local_guide, X, num_samples=5).log_evidence) == []


def test_the_numbers_of_an_evaluation_are_what_they_were():
    found = evaluate(shared, shared_guide, X, num_samples=200)
    assert found.as_dict()["elbo"] == found.elbo and "_together" not in found.as_dict()


def test_plates_are_announced_where_the_default_sums_one_that_was_trusted():
    (said,) = warned(lambda: SiteELBO("rloo", num_particles=2)(mixing, Bits())(X))
    assert "plate 'data'" in said and "plates='trust'" in said
    assert warned(lambda: SiteELBO("rloo", num_particles=2)(mixing, Bits())(X)) == []


@pytest.mark.parametrize("plates", ["check", "trust", "ignore"])
def test_plates_that_are_chosen_are_not_announced(plates):
    assert warned(lambda: SiteELBO("rloo", num_particles=2, plates=plates)(mixing, Bits())(X)) == []


def test_plates_whose_rows_are_independent_are_not_announced():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert warned(lambda: SiteELBO("rloo", num_particles=2)(model, Bits())(X)) == []


def test_announcements_are_silenced_by_their_class_and_are_warnings_of_gumbos():
    assert issubclass(MeaningChanged, FutureWarning) and issubclass(MeaningChanged, GumboWarning)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=MeaningChanged)
        changes.announce("log_evidence")
    assert found == []


def test_one_of_several_processes_announces(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert warned(lambda: changes.announce("log_evidence")) == []


def test_announcements_last_one_version():
    assert re.match(rf"{re.escape(changes.VERSION)}\b", gumbo.__version__), "remove what the last version announced"


def test_a_user_sees_it_on_standard_error_in_a_line():
    code = "from gumbo.changes import announce; [announce('log_evidence') for _ in range(3)]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("MeaningChanged: the meaning of log_evidence") == 1
    quiet = subprocess.run([sys.executable, "-W", "ignore:the meaning of", "-c", code], capture_output=True, text=True)
    assert quiet.stderr == ""

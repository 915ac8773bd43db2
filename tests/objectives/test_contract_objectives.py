"""The contract of objectives, held to every one in the registry."""

from __future__ import annotations

import re

import pytest
from pages import DOCS

from gumbo.experiments import cli, listing
from gumbo.inference.estimators import estimators
from gumbo.inference.objectives import objectives
from gumbo.testing import check_objective


@pytest.mark.parametrize("word", objectives)
def test_an_objective_keeps_its_contract(word, param_store):
    check_objective(word)


def test_a_listed_objective_names_the_estimators_that_serve_it(capsys):
    found = listing.catalogue(kinds=["objectives"])["objectives"]
    assert set(found) == set(objectives)
    for word, make in estimators.items():
        for name in ("elbo", "iwae"):
            assert (word in found[name]["estimators"]) == (name in make().objectives)
    assert found["rws"]["estimators"] == [] and found["free-bits"]["estimators"] == ["pathwise"]
    cli.main(["list", "objectives"])
    said = capsys.readouterr().out
    assert said.startswith("objectives\n") and all(f"\n  {name} " in said for name in objectives)
    assert "guides" not in said and "`" not in said


def test_the_list_says_for_which_model_an_estimator_is_unbiased():
    said = {word: listing._cells("estimators", entry)[0] for word, entry in listing._estimators().items()}
    assert said["concrete"] == "unbiased for the relaxed model only"
    assert said["rebar"] == "unbiased, relaxes the model" and said["gumbel-softmax"] == "biased, relaxes the model"


def test_the_page_of_objectives_has_a_row_for_each():
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "objectives.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(objectives)


def test_an_unknown_kind_is_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["list", "objectivs"])
    assert "unknown kind 'objectivs': did you mean 'objectives'?" in capsys.readouterr().err

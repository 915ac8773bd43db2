"""The word ``auto``: what it measures, chooses, writes and keeps."""

from __future__ import annotations

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import DISCRETE, gradient
from resuming import After, images, pair, quiet
from torch import nn

from gumbo.errors import BadInput, Interrupted, UnknownName, UnsupportedSite
from gumbo.guides import BernoulliGuide, fitting, guides
from gumbo.inference import Auto, SiteELBO, audit
from gumbo.inference.auditing import automatic
from gumbo.inference.auditing.automatic import _Pilot
from gumbo.inference.engine.resolution import as_estimator
from gumbo.inference.estimators import estimators
from gumbo.inference.training.choices import FILE, Choices
from gumbo.models import BernoulliVAE, GaussianMixtureVAE

FEW = {"draws": 10, "candidates": ["score", "rloo", "disarm", "enumerate"], "quiet": True}


def coins(latents=5):
    torch.manual_seed(0)
    model = BernoulliVAE((1, 2, 3), num_latents=latents, hidden=(5,))
    return model, BernoulliGuide(model), torch.bernoulli(torch.full((6, 1, 2, 3), 0.5))


@pytest.mark.slow
def test_the_choice_has_the_least_variance_times_model_runs():
    model, guide, x = coins()
    words = ["score", "score-average", "rloo", "disarm", "local-expectation", "enumerate"]
    chooser = Auto(draws=60, max_evaluations=16, candidates=words, quiet=True)  # so that 32 values are too many to list
    elbo = SiteELBO(chooser)
    elbo(model, guide).initialize(x)
    word = elbo.choice.words["z"]
    rows = {row.word: row for row in elbo.choice.rows}
    assert "more than 16 model runs" in rows["enumerate"].note
    assert rows[word].chosen and rows[word].score == min(r.score for r in rows.values() if r.score == r.score)
    fixed = [name for name, row in rows.items() if row.draws]
    report = audit(model, guide, x, estimators=fixed, num_samples=100, burn_in=20)
    best = report.evaluation_normalized_variance.min().item()
    assert report.evaluation_normalized_variance.sel(estimator=word).item() < 1.5 * best


def test_where_everything_can_be_listed_nothing_is_left_to_chance(capsys):
    model, guide = DISCRETE["chain"].make()
    both = nn.ModuleList([model, guide])
    before = [p.detach().clone() for p in nn.Module.parameters(both)]
    state = torch.get_rng_state()
    elbo = SiteELBO(Auto(draws=10, candidates=["score", "rloo", "enumerate"]))
    loss = elbo(model, guide).initialize()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, nn.Module.parameters(both), strict=True))
    assert elbo.choice.words == {"z1": "enumerate", "z2": "enumerate"}
    slopes = torch.stack([gradient(loss(), both) for _ in range(3)])
    assert slopes.std(0).max() == 0 and slopes.abs().max() > 1e-3
    said = capsys.readouterr().err
    assert said.startswith("auto chose z1: enumerate, z2: enumerate") and "| chosen |" in said


def test_the_same_seed_makes_the_same_choice_from_the_same_numbers():
    found = []
    for seed in (0, 0, 1):
        model, guide, x = coins()
        torch.rand(7)
        elbo = SiteELBO(Auto(**FEW | {"seed": seed, "max_evaluations": 16}))
        elbo(model, guide).initialize(x)
        found.append([(row.word, row.variance, row.evaluations) for row in elbo.choice.rows if row.draws])
    assert found[0] == found[1] != found[2]


def test_a_site_chosen_beside_other_words_is_chosen_again(monkeypatch):
    """Enumerating y pays only once z has no score term; z is chosen after y."""
    scores = {("score", "pathwise"): 9, ("rloo", "pathwise"): 4, ("enumerate", "pathwise"): 5}
    scores |= {("score", "stl"): 8, ("rloo", "stl"): 3, ("enumerate", "stl"): 1}

    def contest(pilot, entries):
        for row, words in entries:
            row.score = scores[words["y"], words["z"]]
        pilot.rows += [row for row, _ in entries]
        best = min(entries, key=lambda entry: entry[0].score)[0]
        best.chosen = True
        return best

    monkeypatch.setattr(_Pilot, "_contest", contest)
    model = GaussianMixtureVAE((1, 2, 3), latent_dim=2, num_components=3, hidden=(5,))
    guide = guides[fitting(model)[0]](model)
    served = {"y": ["score", "rloo", "enumerate"], "z": ["pathwise", "stl"]}
    monkeypatch.setattr(_Pilot, "_candidates", lambda pilot, name: {word: estimators[word]() for word in served[name]})
    elbo = SiteELBO(Auto(quiet=True))
    elbo(model, guide).initialize(torch.ones(4, 1, 2, 3))
    assert elbo.choice.words == {"y": "enumerate", "z": "stl"}
    chosen = [(row.site, row.word) for row in elbo.choice.rows if row.chosen]
    assert chosen == [("y", "enumerate"), ("z", "stl"), ("(all)", "y: enumerate")]


def test_only_the_sites_that_ask_are_chosen_for():
    model, guide = DISCRETE["chain"].make()
    elbo = SiteELBO({"z1": Auto(**FEW), "z2": "score"})
    loss = elbo(model, guide).initialize()
    assert list(elbo.choice.words) == ["z1"] and loss.binding.chosen["z2"].name == "score"

    def marked():
        z1 = pyro.sample("z1", dist.Bernoulli(0.4), infer={"estimator": "score"})
        pyro.sample("z2", dist.Bernoulli(0.2 + 0.5 * z1))

    elbo = SiteELBO(Auto(**FEW))
    with pyro.get_param_store().scope():
        elbo.loss(model, marked)
    assert list(elbo.choice.words) == ["z2"]


def test_biased_words_take_part_only_where_they_may_and_with_their_bias():
    model, guide, x = coins()
    options = {"draws": 60, "quiet": True, "candidates": ["rloo", "straight-through", "gumbel-softmax"]}
    plain, biased = SiteELBO(Auto(**options)), SiteELBO(Auto(allow_biased=True, **options))
    for elbo in (plain, biased):
        elbo(model, guide).initialize(x)
    assert [row.word for row in plain.choice.rows] == ["rloo"]
    rows = {row.word: row for row in biased.choice.rows}
    assert rows["rloo"].squared_bias == 0 and rows["straight-through"].squared_bias > 0
    for row in rows.values():
        assert row.score == pytest.approx((row.variance + row.squared_bias) * row.evaluations)


def test_words_with_options_are_texts_too():
    chooser = as_estimator("auto(allow_biased=True, draws=40)")
    assert isinstance(chooser, Auto) and chooser.allow_biased and chooser.draws == 40 and not chooser.unbiased
    assert isinstance(as_estimator("auto"), Auto) and as_estimator("auto").unbiased
    for text, said in (("auto(3)", "by name"), ("auto(drws=3)", "drws"), ("auto(draws=)", "by name")):
        with pytest.raises(BadInput, match=said):
            as_estimator(text)


def test_what_cannot_be_meant_is_one_line():
    with pytest.raises(BadInput, match="cost is 'steps': expected 'evaluations' or 'time'"):
        Auto(cost="steps")
    with pytest.raises(BadInput, match="draws is 3: expected at least 8"):
        Auto(draws=3)
    with pytest.raises(BadInput, match="rising order"):
        Auto(again=[5, 5])
    with pytest.raises(UnknownName, match="did you mean 'rloo'"):
        Auto(candidates=["rlo"])
    model, guide = DISCRETE["one coin"].make()
    with pytest.raises(UnsupportedSite, match="'z'.*no unbiased estimator among the candidates"):
        SiteELBO(Auto(candidates=["pathwise", "gumbel-softmax"], allow_biased=True))(model, guide)()
    with pytest.raises(BadInput, match="takes no estimator"):
        SiteELBO("auto", objective="rws")

    def marked():
        pyro.sample("z", dist.Bernoulli(0.4), infer={"estimator": "auto"})

    chosen = "chosen for a loss, and not by a site's own mark"
    with pyro.get_param_store().scope(), pytest.raises(UnsupportedSite, match=chosen):
        SiteELBO("rloo").loss(model, marked)


def test_a_budget_of_seconds_that_ends_is_said(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(automatic.time, "process_time", lambda: float(next(clock)))
    model, guide, x = coins()
    elbo = SiteELBO(Auto(draws=10, seconds=0.5, candidates=["score", "rloo", "disarm"], quiet=True))
    elbo(model, guide).initialize(x)
    assert elbo.choice.words == {"z": "score"} and "rloo at z, disarm at z" in str(elbo.choice)


def test_time_may_be_the_cost():
    model, guide, x = coins()
    elbo = SiteELBO(Auto(**FEW | {"cost": "time", "max_evaluations": 16}))
    elbo(model, guide).initialize(x)
    row = next(row for row in elbo.choice.rows if row.chosen)
    assert row.score == pytest.approx(row.variance * row.seconds)


# In a run.


def options(**changes):
    return {"loss": SiteELBO(Auto(**FEW | changes)), "epochs": 3, "valid": images(10, 1), "valid_samples": 2}


def test_the_choice_is_written_before_the_first_step_and_kept(tmp_path, monkeypatch):
    whole = quiet(*pair("bernoulli"), images(), run_dir=tmp_path / "whole", **options(max_evaluations=1))

    class Stop(Exception):
        pass

    steps = []
    from gumbo.inference.training.steps import TorchStep

    own = TorchStep.__call__

    def interrupted(self, batch):
        steps.append(json.loads((tmp_path / "parts" / FILE).read_text()))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return own(self, batch)

    monkeypatch.setattr(TorchStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(
            *pair("bernoulli"), images(), run_dir=tmp_path / "parts", checkpoint_steps=1, **options(max_evaluations=1)
        )
    assert steps[0][0]["step"] == 0 and set(steps[0][0]["words"]) == {"z"}
    monkeypatch.setattr(TorchStep, "__call__", own)
    monkeypatch.setattr(Auto, "choose", lambda *args: pytest.fail("it has been chosen"))
    parts = quiet(
        *pair("bernoulli", 4), images(), run_dir=tmp_path / "parts", resume=True, **options(max_evaluations=1)
    )
    assert [n["valid_elbo"] for n in parts.history] == [n["valid_elbo"] for n in whole.history]
    (tmp_path / "parts" / FILE).write_text("[]")
    with pytest.raises(BadInput, match="does not say which estimators the run took"):
        quiet(*pair("bernoulli", 4), images(), run_dir=tmp_path / "parts", resume=True, **options(max_evaluations=1))


@pytest.fixture
def turns(monkeypatch):
    """A pilot that chooses another word each time, by the step at which it is asked."""
    words = iter(["score", "score-average", "rloo"] * 5)

    def choose(self, loss, model, guide, batches):
        assert batches
        return automatic.Choice({"z": next(words)})

    monkeypatch.setattr(Auto, "choose", choose)


def test_a_schedule_looks_again_and_says_so(tmp_path, turns, capsys):
    made = options(again=(2, 4), quiet=False)
    quiet(*pair("bernoulli"), images(), run_dir=tmp_path / "run", **made | {"progress": True})
    kept = json.loads((tmp_path / "run" / FILE).read_text())
    assert [(one["step"], one["words"]["z"]) for one in kept] == [(0, "score"), (2, "score-average"), (4, "rloo")]
    said = capsys.readouterr().err
    assert said.count("auto chose z: ") == 3


@pytest.mark.slow
def test_a_run_that_looks_again_goes_on_to_the_same_numbers(tmp_path):
    made = {"again": (2, 4), "max_evaluations": 1}
    for seed, calls in ((0, 4), (5, 3)):
        with pytest.raises(Interrupted):
            quiet(
                *pair("bernoulli", seed),
                images(),
                transform=After(calls, stop),
                run_dir=tmp_path / "parts",
                resume=True,
                **options(**made),
            )
    parts = quiet(
        *pair("bernoulli", 9),
        images(),
        transform=After(0, stop),
        run_dir=tmp_path / "parts",
        resume=True,
        **options(**made),
    )
    whole = quiet(*pair("bernoulli"), images(), transform=After(0, stop), run_dir=tmp_path / "again", **options(**made))
    assert [n["valid_elbo"] for n in parts.history] == [n["valid_elbo"] for n in whole.history]
    mine, theirs = (json.loads((tmp_path / name / FILE).read_text()) for name in ("parts", "again"))
    assert [one["words"] for one in mine] == [one["words"] for one in theirs]


def stop():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


def test_looking_again_is_for_one_eager_process(tmp_path):
    with pytest.raises(BadInput, match=r"again=…\) changes estimators in one eager process"):
        quiet(*pair("bernoulli"), images(), **options(again=(2,)) | {"compile": True})


class Others:
    """Two processes, of which this one is not the main one."""

    main = False

    def from_main(self, action):
        return automatic.Choice({"z": "disarm"}).as_dict()


def test_all_processes_take_the_choice_of_the_main_one(tmp_path):
    choices = Choices(SiteELBO(Auto(**FEW)), tmp_path, Others(), speaks=False)

    class Rows:
        def of_epoch(self, epoch):
            return iter([])

    loss = choices.settle(None, None, Rows(), False, False)
    assert loss.given["z"].name == "disarm" and not loss.undecided
    choices.write()
    assert not (tmp_path / FILE).exists()  # the main process writes

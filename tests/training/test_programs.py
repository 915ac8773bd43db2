"""fit: functions, bound methods and pyro.param; what a loss stands for; parameters of single rows."""

from __future__ import annotations

import functools
import json
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine import block
from torch import nn
from torch.distributions import constraints

from gumbo.errors import BadInput, GumboWarning
from gumbo.inference import evaluate, fit
from gumbo.inference.engine.scopes import one_at_a_time
from gumbo.inference.training.checkpoints import load_checkpoint

quiet = functools.partial(fit, progress=False, lr=1e-2)
X = torch.tensor([0.3, -1.2, 0.8, 2.0, 1.0, 0.1, -0.4, 1.4])


@pytest.fixture(autouse=True)
def own_store():
    with pyro.get_param_store().scope():
        yield


class VAE(nn.Module):
    """As Pyro's own tutorials write it: two methods that register the networks."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Before a BatchNorm a bias has no gradient but rounding, which Adam would make a step of.
            first = nn.Linear(1, 4, bias=False)
            self.encoder = nn.Sequential(first, nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))
            self.decoder = nn.Linear(1, 1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z)[..., 0], 1.0), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x[:, None]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def model(x):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", lambda: torch.randn(()))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("m", dist.Normal(loc, scale))


def state_of(vae: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in vae.state_dict().values()])


@pytest.mark.parametrize(
    "loss", [Trace_ELBO(), TraceGraph_ELBO(), "pathwise"], ids=["trace", "trace-graph", "pathwise"]
)
def test_bound_methods_train_as_under_svi(loss):
    ours, theirs = VAE(), VAE()
    quiet(ours.model, ours.guide, X, loss=loss, epochs=4, batch_size=8, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
        for _ in range(4):
            svi.step(X)
    assert torch.allclose(state_of(ours), state_of(theirs), atol=2e-4)  # a BatchNorm and Adam enlarge rounding
    assert not torch.allclose(state_of(ours), state_of(VAE()), atol=1e-3)


@pytest.mark.parametrize("loss", ["pathwise", "trace-graph"])
def test_parameters_of_the_store_train_in_place_and_nothing_else_there_changes(loss):
    store = pyro.get_param_store()
    store.setdefault("mine", torch.ones(2))
    quiet(model, guide, X, loss=loss, epochs=300, batch_size=8, lr=0.05)
    precision = 8 + 0.01
    assert set(store.keys()) == {"mine", "loc", "scale"} and store["mine"].tolist() == [1.0, 1.0]
    assert store["loc"].item() == pytest.approx(X.sum().item() / precision, abs=0.1)
    assert store["scale"].item() == pytest.approx(precision**-0.5, abs=0.03)
    kept = store._params["loc"]
    before = kept.clone()
    quiet(model, guide, X, loss=loss, epochs=1, batch_size=8, lr=0.05)  # goes on from where the store stands
    assert store._params["loc"] is kept and 0 < (kept - before).abs() <= 0.0501
    assert evaluate(model, guide, X, num_samples=200).elbo == pytest.approx(
        quiet(model, guide, X, valid=X, loss=loss, epochs=1, batch_size=8, lr=1e-9).history[0]["valid_elbo"], abs=0.02
    )


@pytest.mark.parametrize("loss", ["pathwise", "nvil", "trace-graph"])
def test_a_resumed_run_of_bound_methods_and_store_parameters_gives_the_same_bits(tmp_path, loss):
    def run(vae, epochs, folder, resume=False):
        def guided(x):
            shift = pyro.param("shift", lambda: torch.randn(()))
            return vae.guide(x + shift)

        with pyro.get_param_store().scope():
            options = {"epochs": epochs, "batch_size": 4, "run_dir": tmp_path / folder, "resume": resume, "valid": X}
            result = quiet(vae.model, guided, X, loss=loss, **options)
            shift = pyro.param("shift").item()
        numbers = [{k: v for k, v in h.items() if k not in ("ms_per_step", "seconds")} for h in result.history]
        return numbers, shift, state_of(vae)

    whole = run(VAE(), 4, "whole")
    run(VAE(), 2, "parts")
    parts = run(VAE(seed=1), 4, "parts", resume=True)  # all of it must come from the checkpoint
    assert whole[:2] == parts[:2] and torch.equal(whole[2], parts[2])
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["module"] for name in ("whole", "parts")]
    assert any(name.endswith("running_mean") for name in states[0])


class Shifted(PyroModule):
    """A module that asks the store for a parameter beside its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), self.scale.exp()))


def test_a_module_may_call_pyro_param():
    guide = Shifted()
    quiet(model, guide, X, loss="pathwise", epochs=300, batch_size=8, lr=0.05)
    assert pyro.param("loc").item() == pytest.approx(X.sum().item() / 8.01, abs=0.1)
    assert guide.scale.exp().item() == pytest.approx(8.01**-0.5, abs=0.03)


def test_networks_that_are_not_registered_stay_and_are_told():
    vae = VAE()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, scale = vae.encoder(x[:, None]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    before = [p.clone() for p in vae.encoder.parameters()]
    with pytest.warns(GumboWarning, match="5 parameters of networks .* without pyro.module are not trained"):
        quiet(vae.model, guide, X, loss="trace", epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(vae.encoder.parameters(), before, strict=True))
    assert all(p.requires_grad for p in vae.parameters())


def test_what_is_left_in_the_store_of_another_network_is_not_trained():
    pyro.module("decoder", VAE(seed=5).decoder)
    stale = pyro.get_param_store()._params["decoder$$$weight"]
    value, vae = stale.clone(), VAE()
    weight = vae.decoder.weight.clone()
    quiet(vae.model, vae.guide, X, loss="trace", epochs=1)
    assert torch.equal(stale, value) and not torch.equal(vae.decoder.weight, weight)

    def clashing(x):
        pyro.module("decoder", vae.encoder[0])
        vae.guide(x)

    with pytest.raises(BadInput, match=r"two networks register a parameter 'decoder\.weight'"):
        quiet(vae.model, clashing, X, loss="trace", epochs=1)


# What a loss stands for.


def subsampled(size, batch):
    def model(x):
        pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, subsample_size=batch(x)) as rows:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[rows] if len(x) > batch(x) else x)

    return model


def sequential(x):
    pyro.sample("m", dist.Normal(0.0, 1.0))
    for row in pyro.plate("data", 8, subsample_size=len(x)):
        pyro.sample(f"x_{row}", dist.Normal(0.0, 1.0), obs=x[row % len(x)])


class Prior(PyroModule):
    """The prior as the guide: what is left of the bound is what the data say, the same in every draw."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))

    def forward(self, x=None):
        pyro.sample("m", dist.Normal(0 * self.loc, 1.0))


ROWS = torch.full((8,), 0.5)  # alike, so that every subsample gives the same
NATS = dist.Normal(0.0, 1.0).log_prob(ROWS[0]).item()


@pytest.mark.parametrize(
    ("program", "batch_size"),
    [
        (subsampled(8, len), 4),
        (subsampled(8, len), 3),  # a smaller last batch
        (subsampled(8, lambda x: 3), 8),  # a part of what the program is given
        (subsampled(8, len), 8),
        (subsampled(800, len), 4),  # the rows are themselves a part of more
        (sequential, 4),
    ],
)
@pytest.mark.parametrize("loss", ["pathwise", "trace-graph"])
def test_the_reported_objective_is_in_nats_per_datum_where_plates_are_subsampled(tmp_path, program, batch_size, loss):
    result = quiet(program, Prior(), ROWS, loss=loss, epochs=2, batch_size=batch_size, run_dir=tmp_path)
    assert [numbers["elbo"] for numbers in result.history] == pytest.approx([NATS, NATS], abs=1e-6)
    written = [json.loads(line)["elbo"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [numbers["elbo"] for numbers in result.history]


def test_a_point_with_a_density_outside_the_data_plate_is_no_datum():
    """Pyro's SplitReparam and NeuTraReparam leave such sites."""

    def model(x):
        shifted = pyro.sample("m", dist.Normal(0.0, 1.0)) + 1
        pyro.sample("shifted", dist.Delta(shifted, log_density=torch.tensor(0.8)), obs=shifted)
        with pyro.plate("data", 8, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    result = quiet(model, Prior(), ROWS, loss="pathwise", epochs=1, batch_size=4)
    assert result.history[-1]["elbo"] == pytest.approx(NATS + 0.1, abs=1e-6)


def test_the_training_bound_and_the_validation_bound_are_in_one_unit():
    result = quiet(subsampled(8, len), Prior(), ROWS, valid=ROWS, loss="pathwise", epochs=1, batch_size=2)
    assert result.history[-1]["elbo"] == pytest.approx(result.history[-1]["valid_elbo"], abs=1e-6)


def test_data_without_rows_are_reported_per_element_of_their_plate():
    def model():
        pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=ROWS[rows])

    result = quiet(model, Prior(), (), loss="pathwise", epochs=2)
    assert result.history[-1]["elbo"] == pytest.approx(NATS, abs=1e-6)


# Parameters of single rows.


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_hand(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(len(x))), 0.5**0.5))


def parts():
    guide = AutoGuideList(local)
    guide.append(AutoNormal(block(local, expose=["z"])))
    return guide


GUIDES = {
    "AutoNormal": lambda: AutoNormal(local, init_scale=0.5),
    "AutoDelta": lambda: AutoDelta(local),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(local),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(local),
    "AutoGuideList": parts,
    "pyro.param": lambda: by_hand,
}


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("batch_size", [4, 3, 2, 1])
def test_parameters_of_rows_are_refused_where_batches_would_share_them(kind, batch_size):
    with pytest.raises(BadInput, match="has elements for each row of a batch.*batch_size=8") as error:
        quiet(local, GUIDES[kind](), X, loss="trace", epochs=1, batch_size=batch_size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in GUIDES if kind != "AutoDelta"])
def test_parameters_of_rows_train_where_all_rows_are_one_batch(kind):
    guide = GUIDES[kind]()
    quiet(local, guide, X, loss=Trace_ELBO(num_particles=20, vectorize_particles=True), epochs=150, lr=0.05)
    found = evaluate(local, guide, X, num_samples=2000)
    truth = dist.Normal(0.0, 2**0.5).log_prob(X).mean().item()
    assert found.elbo == pytest.approx(truth, abs=0.02)  # rows stay with their parameters from epoch to epoch
    with pytest.raises(BadInput, match="none for those of valid"):
        quiet(local, guide, X, valid=X[:4], loss="trace", epochs=1)


class Table(PyroModule):
    """A parameter for each row, found by the row's own number: nothing is shared."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Embedding(4, 1)

    def forward(self, data):
        ids, x = data[:, 0].long(), data[:, 1]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(ids)[:, 0], 0.7))


def test_parameters_that_the_data_choose_are_no_parameters_of_rows():
    def model(data):
        local(data[:, 1])

    data = torch.stack([torch.arange(8) % 4, X], 1)
    quiet(model, Table(), data, loss="trace", epochs=1, batch_size=4)  # as many rows as the table has


def test_a_guide_that_knows_its_rows_takes_batches():
    def rows(ids, x):
        return pyro.plate("data", 8, subsample=ids)

    def model(ids, x):
        with rows(ids, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model, create_plates=rows, init_scale=0.5)
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True)
    quiet(model, guide, (torch.arange(8), X), loss=loss, epochs=250, batch_size=4, lr=0.02)
    assert torch.allclose(guide.median(torch.arange(8), X)["z"], X / 2, atol=0.15)


# What the user turned off, numbers of NumPy, nothing at all, several at once.


class Grey(nn.Module):
    def __init__(self, validate: bool | None):
        super().__init__()
        self.net, self.enc, self.validate = nn.Linear(1, 3), nn.Linear(3, 1), validate

    def model(self, x):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=self.net(z), validate_args=self.validate)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("enc", self.enc)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.enc(x), 1.0).to_event(1))


@pytest.mark.parametrize("loss", ["pathwise", "trace", "trace-graph"])
def test_grey_pixels_train_where_the_likelihood_was_told_not_to_validate(loss):
    grey = torch.rand(10, 3)
    off, on = Grey(False), Grey(None)
    result = quiet(off.model, off.guide, grey, valid=grey, loss=loss, epochs=2, batch_size=4)
    assert np.isfinite(result.history[-1]["valid_elbo"])
    with pytest.raises(BadInput, match="'x'|support"):
        quiet(on.model, on.guide, grey, loss=loss, epochs=1, batch_size=4)


def test_whole_numbers_may_be_numpys_and_truth_values_are_none(tmp_path):
    options = {"epochs": np.int64(2), "batch_size": np.int32(4), "seed": np.uint8(3), "valid_samples": np.int64(2)}
    options |= {"checkpoint_every": np.int16(1), "checkpoint_steps": np.int64(1), "patience": np.int64(5)}
    for _ in range(2):
        result = quiet(model, guide, X, valid=X, loss="pathwise", run_dir=tmp_path, resume=True, **options)
    assert result.epochs == 2
    for name in ("epochs", "batch_size", "seed", "patience"):
        with pytest.raises(BadInput, match=f"{name} is True"):
            quiet(model, guide, X, valid=X, loss="pathwise", **{name: True})


@pytest.mark.parametrize("loss", ["pathwise", "trace", "trace-graph"])
def test_programs_without_sites_or_parameters_are_refused(loss):
    def nothing(x):
        pyro.param("w", torch.tensor(1.0))

    with pytest.raises(BadInput, match="no sample sites"):
        quiet(nothing, nothing, X, loss=loss)
    with pytest.raises(BadInput, match="no parameter to train"):
        quiet(local, lambda x: local(pyro.poutine.uncondition(lambda: x)()), X[:0].new_zeros(4), loss=loss)


def test_threads_take_turns():
    vaes = [VAE(seed) for seed in range(3)]
    alone = [VAE(seed) for seed in range(3)]
    for vae in alone:
        quiet(vae.model, vae.guide, X, loss="pathwise", epochs=3, batch_size=4)
    problems = []

    def run(vae):
        try:
            quiet(vae.model, vae.guide, X, loss="pathwise", epochs=3, batch_size=4)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(vae,)) for vae in vaes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(torch.equal(state_of(a), state_of(b)) for a, b in zip(vaes, alone, strict=True))


def test_a_run_that_waits_for_its_turn_leaves_the_generator_alone():
    vae = VAE(0)
    torch.manual_seed(3)
    waiting = threading.Thread(
        target=quiet, args=(vae.model, vae.guide, X), kwargs={"loss": "pathwise", "epochs": 1, "batch_size": 4}
    )
    with one_at_a_time:
        before = torch.get_rng_state()
        waiting.start()
        waiting.join(timeout=2)
        assert waiting.is_alive() and torch.equal(before, torch.get_rng_state())
    waiting.join()


def test_one_batch_of_all_rows_keeps_their_order():
    """What a program holds of the same rows elsewhere, in a closure, would otherwise be paired with other rows."""
    seen = []

    def watched(x):
        seen.append(x.clone())
        return model(x)

    quiet(watched, AutoNormal(model), X, epochs=3, batch_size=len(X))
    assert seen and all(torch.equal(x, X) for x in seen if len(x) == len(X))


SEEN = torch.tensor([True, True, False, True, False, True, True, True])


def half_seen(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=SEEN)


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_latents_that_the_model_alone_masks_are_told(make):
    """Their log q is unbounded in the loss, as in Pyro; `evaluate` leaves it out."""
    with pytest.warns(GumboWarning, match="site 'x_unobserved': the model masks elements that the guide draws"):
        quiet(half_seen, make(half_seen), X, epochs=1, batch_size=8)


def test_latents_that_both_mask_are_quiet():
    def guide(x):
        mu = pyro.sample("mu", dist.Normal(pyro.param("loc", torch.zeros(())), 0.5))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=~SEEN):
            pyro.sample("x_unobserved", dist.Normal(mu, 1.0))

    assert quiet(half_seen, guide, X, epochs=1, batch_size=8).epochs == 1


def test_data_that_require_gradients_train_as_others_do():
    found = []
    for x in (X, X.clone().requires_grad_()):
        torch.manual_seed(0)
        with pyro.get_param_store().scope():
            guide = AutoNormal(latent_mean)
            found.append(quiet(latent_mean, guide, x, epochs=2, batch_size=4, seed=0).history[-1]["elbo"])
    assert found[0] == found[1]


class Registered(PyroModule):
    """A PyroModule with a constrained parameter, a layer, and a name that looks like the guide's."""

    def __init__(self):
        super().__init__()
        self.width = pyro.nn.PyroParam(torch.tensor(1.0), constraint=constraints.positive)
        self.layer, self.guide = nn.Linear(1, 1), nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.layer(x[:, None])[:, 0] + self.guide, self.width), obs=x)


def with_params(x):
    scale = pyro.param("a.scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale), obs=x)


NET = nn.Linear(1, 1)


def with_a_network(x):
    net = pyro.module("net", NET)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(net(x[:, None])[:, 0], 1.0), obs=x)


def no_latents(x):
    pass


NAMED = {
    "pyro.param": lambda: (with_params, no_latents),
    "pyro.module": lambda: (with_a_network, no_latents),
    "methods": lambda: (lambda vae: (vae.model, vae.guide))(VAE()),
    "PyroModule": lambda: (Registered(), no_latents),
    "autoguide": lambda: (lambda model: (model, AutoNormal(model)))(lambda x: latent_mean(x)),
}


def latent_mean(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean + pyro.param("shift", torch.tensor(0.0)), 1.0), obs=x)


def noted(names, name):
    names.add(name)
    return {"lr": 0.1}


@pytest.mark.parametrize("loss", ["default", "trace"])
@pytest.mark.parametrize("kind", NAMED)
def test_a_pyro_optimizer_asks_for_the_names_of_svi(kind, loss):
    seen: dict[str, set[str]] = {"svi": set(), "fit": set()}
    for how, names in seen.items():
        with pyro.get_param_store().scope():
            model, guide = NAMED[kind]()
            optimizer = pyro.optim.Adam(functools.partial(noted, names))
            if how == "svi":
                SVI(model, guide, optimizer, Trace_ELBO()).step(X)
            else:
                quiet(model, guide, X, loss=loss, optimizer=optimizer, epochs=1)
    assert seen["fit"] == seen["svi"]

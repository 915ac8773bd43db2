"""Model and guide that disagree on the shape of a site, and some that only look as if they did."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0)


def in_plate(fn, size=4, name="data"):
    def program():
        with pyro.plate(name, size):
            pyro.sample("z", fn)

    return program


def bare(fn):
    return lambda: pyro.sample("z", fn)


def nested(outer, inner, fn):
    def program():
        with pyro.plate("outer", outer, dim=-2), pyro.plate("inner", inner, dim=-1):
            pyro.sample("z", fn)

    return program


DISAGREE = {
    "event of three, event of one": (
        in_plate(normal(4, 3).to_event(1)),
        in_plate(normal(4, 1).to_event(1)),
        r"event \(3,\) in the model.*event \(1,\) in the guide",
    ),
    "event of one, event of three": (
        in_plate(normal(4, 1).to_event(1)),
        in_plate(normal(4, 3).to_event(1)),
        r"event \(1,\) in the model.*event \(3,\) in the guide",
    ),
    "event of none, event of one": (bare(normal()), bare(normal(1).to_event(1)), r"event \(\).*event \(1,\)"),
    "a plate that the model's site is not in": (
        bare(normal()),
        in_plate(normal()),
        r"batch \(\) and event \(\) in the model.*plate 'data'",
    ),
    "a plate that the guide's site is not in": (in_plate(normal()), bare(normal()), r"batch \(4,\) and.*batch \(\)"),
    "plates of other sizes": (in_plate(normal()), in_plate(normal(), 3, "rows"), r"batch \(4,\) and.*batch \(3,\)"),
    "one plate of two": (nested(2, 4, normal()), in_plate(normal(), name="inner"), r"batch \(2, 4\) and.*batch \(4,\)"),
}


@pytest.mark.parametrize("case", DISAGREE)
@pytest.mark.parametrize("options", [{}, {"num_particles": 2}, {"vectorize_particles": False}, {"objective": "iwae"}])
def test_shapes_that_disagree_are_one_line(case, options):
    model, guide, says = DISAGREE[case]
    with pytest.raises(UnsupportedSite, match=f"(?s)site 'z'.*{says}"):
        SiteELBO(**options).loss(model, guide)


def test_a_plate_of_one_name_and_two_sizes():
    with pytest.raises(BadInput, match="plate 'data' has 3 rows where it is first met and 4 later"):
        SiteELBO().loss(in_plate(normal()), in_plate(normal(), 3))


def test_a_later_batch_is_looked_at_too():
    def model(n):
        with pyro.plate("data", 4):
            pyro.sample("z", normal(3).to_event(1))

    def guide(n):
        with pyro.plate("data", 4):
            pyro.sample("z", normal(n).to_event(1))

    elbo = SiteELBO(num_particles=2)
    elbo.loss(model, guide, 3)
    with pytest.raises(UnsupportedSite, match="model and guide disagree on its shape"):
        elbo.loss(model, guide, 1)


AGREE = {
    "one spread by its plate, one written out": (in_plate(normal()), in_plate(normal(4))),
    "a plate of one": (bare(normal()), in_plate(normal(), 1)),
    "plates of other names": (in_plate(normal()), in_plate(normal(), name="rows")),
    "an auxiliary site": (
        lambda: pyro.sample("z", normal(3).to_event(1)),
        lambda: pyro.sample(
            "z", dist.Delta(pyro.sample("e", normal(3).to_event(1), infer={"is_auxiliary": True}), event_dim=1)
        ),
    ),
    "a coin and a die": (
        in_plate(dist.Categorical(torch.ones(3))),
        in_plate(dist.Categorical(torch.ones(4, 3)), name="data"),
    ),
}


@pytest.mark.parametrize("case", AGREE)
@pytest.mark.parametrize("options", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": False}])
def test_shapes_that_agree_pass(case, options):
    word = "enumerate" if "die" in case else "default"
    assert isinstance(SiteELBO(word, **options).loss(*AGREE[case]), float)


def test_enumerated_values_upstream_are_no_part_of_the_shape():
    def program():
        with pyro.plate("data", 4):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("w", dist.Bernoulli(0.2 + 0.5 * y))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert SiteELBO({"y": "enumerate", "w": "enumerate", "z": "pathwise"}, num_particles=2).loss(
        program, program
    ) == pytest.approx(0.0, abs=1e-5)

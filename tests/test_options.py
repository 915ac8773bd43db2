"""Options of constructors: what cannot be meant is one line that names the class and the option."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from gumbo.errors import BadInput
from gumbo.guides import FlowGuide, LayeredGuide, NormalGuide
from gumbo.inference import Constant, Cosine, Exponential, Linear, SiteELBO
from gumbo.inference.estimators import (
    ARM,
    Enumerate,
    Estimator,
    GumbelSoftmax,
    MovingAverage,
    Neural,
    Rebar,
    Relax,
    ScoreFunction,
)
from gumbo.models import BayesianRegression, CategoricalVAE, ConditionalVAE, ConvVAE, GaussianVAE
from gumbo.options import check_option, holds_to_annotations

SHAPE = (1, 2, 2)
INF, NAN = math.inf, math.nan


def small() -> GaussianVAE:
    return GaussianVAE(SHAPE, latent_dim=2, hidden=(3,))


CANNOT_BE_MEANT = [
    (GaussianVAE, {"latent_dim": value}) for value in (-1, 0, "abc", True, 2.0, NAN, INF, [2], None, 2**40)
]
CANNOT_BE_MEANT += [
    (GaussianVAE, {"hidden": value}) for value in (8, [-3], [0], "abc", [True], [2.5], {3}, [[3]], None)
]
CANNOT_BE_MEANT += [(GaussianVAE, {"data_size": value}) for value in (0, -1, 1.5, True)]
CANNOT_BE_MEANT += [(ConvVAE, {"channels": ()}), (ConditionalVAE, {"condition_shape": ()})]
CANNOT_BE_MEANT += [(GaussianVAE, {"activation": value}) for value in (3, None, ["relu"])]
CANNOT_BE_MEANT += [(CategoricalVAE, {"temperature": value}) for value in (0, -1.0, NAN, INF, True, "1")]
CANNOT_BE_MEANT += [(CategoricalVAE, {"relaxed": value}) for value in (1, "no", None)]
CANNOT_BE_MEANT += [(BayesianRegression, {"noise_sd": value}) for value in (0, NAN, INF, "a")]
CANNOT_BE_MEANT += [(NormalGuide, {"hidden": value}) for value in ("abc", [0], 3, [NAN])]
CANNOT_BE_MEANT += [(NormalGuide, {"min_sd": value}) for value in (-1e-3, NAN, INF, True)]
CANNOT_BE_MEANT += [(FlowGuide, {"transforms": 0}), (FlowGuide, {"flow": 3}), (LayeredGuide, {"parents": {"z": [3]}})]
CANNOT_BE_MEANT += [(GumbelSoftmax, {"temperature": value}) for value in (0, -1.0, NAN, INF, True, "1", None)]
CANNOT_BE_MEANT += [(GumbelSoftmax, {"hard": True, "rao": value}) for value in (-1, True, 2.5, NAN)]
CANNOT_BE_MEANT += [(Relax, {"hidden": 0}), (Relax, {"net": 3}), (Rebar, {"strength": NAN}), (Enumerate, {"limit": 0})]
CANNOT_BE_MEANT += [(MovingAverage, {"decay": value}) for value in (NAN, -0.1, 1.0, True)]
CANNOT_BE_MEANT += [(Neural, {"decay": 1.0}), (Neural, {"hidden": True}), (ScoreFunction, {"baseline": 3})]
CANNOT_BE_MEANT += [(Constant, {"value": value}) for value in (NAN, INF, -1, True, "a")]
CANNOT_BE_MEANT += [(Linear, {"steps": value}) for value in (0, 2.5, True, NAN)]
CANNOT_BE_MEANT += [(Exponential, {"start": 1.0, "floor": 0.5, "rate": NAN}), (Cosine, {"steps": 3, "end": INF})]
CANNOT_BE_MEANT += [(SiteELBO, {"estimators": "rloo", "kl_weight": value}) for value in (NAN, INF, -1, True, "a")]
CANNOT_BE_MEANT += [(SiteELBO, {"estimators": "rloo", "num_particles": value}) for value in (True, 0, 2.5, NAN, "a")]


@pytest.mark.parametrize(("make", "options"), CANNOT_BE_MEANT, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_cannot_be_meant_is_one_line_that_names_it(make, options):
    places = (SHAPE,) if make.__module__.startswith("gumbo.models") else ()
    places = (small(),) if make.__module__.startswith("gumbo.guides") else places
    with pytest.raises(BadInput) as error:
        make(*places, **options)
    option = list(options)[-1]
    assert make is SiteELBO or make.__name__ in str(error.value)
    assert option in str(error.value)


def test_an_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(BadInput, match="GaussianVAE.*'latents'.*latent_dim"):
        GaussianVAE(SHAPE, latents=3)
    with pytest.raises(BadInput, match="ARM takes no options"):
        ARM(3)


def test_sizes_that_no_memory_holds_are_one_line():
    with pytest.raises(BadInput, match="GaussianVAE cannot be made"):
        GaussianVAE((2**15, 2**15), latent_dim=2, hidden=(2**20,))


def test_what_can_be_meant_is_taken():
    assert GaussianVAE(SHAPE, latent_dim=np.int64(2), hidden=[3]).config["latent_dim"] == 2
    assert GaussianVAE(torch.Size(SHAPE), latent_dim=2, hidden=()).data_shape == SHAPE
    assert GumbelSoftmax(np.float32(0.5)).temperature == 0.5
    assert GumbelSoftmax(lambda step: 1.0).temperature(3) == 1.0
    assert NormalGuide(small(), min_sd=0).config["min_sd"] == 0
    assert Linear(np.int64(10))(5) == 0.5


def test_copies_are_made_as_before():
    for thing in (small(), NormalGuide(small()), GumbelSoftmax(0.3), Linear(5), MovingAverage()):
        for again in (copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
            assert type(again) is type(thing)
    assert copy.copy(GumbelSoftmax(0.3)).temperature == 0.3


class Shifted(Estimator):
    def __init__(
        self, shift: float = -1.0, places: Sequence[int] = (0,), table: Mapping[str, int] | None = None, free=3
    ):
        self.shift = shift


def test_a_class_of_the_users_own_says_its_kinds_and_keeps_its_ranges():
    assert Shifted(-2.0, (-3,), {"a": 0}, object()).shift == -2.0
    for options in ({"shift": "a"}, {"shift": NAN}, {"places": [0.5]}, {"table": {"a": "b"}}, {"table": {1: 1}}):
        with pytest.raises(BadInput, match=f"Shifted: {list(options)[0]}"):
            Shifted(**options)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, int, True),
        (1.0, int, False),
        (None, int | None, True),
        ("a", str | None, True),
        (True, bool, True),
        (1, bool, False),
        ((1, 2), Sequence[int], True),
        (b"ab", Sequence[int], False),
        ({"a": [1]}, Mapping[str, Sequence[int]], True),
        ({"a": 1}, Mapping[str, Sequence[int]], False),
        (3, "whatever", True),
    ],
)
def test_a_value_is_held_against_its_annotation(value, hint, fits):
    if fits:
        check_option("it", value, hint)
    else:
        with pytest.raises(BadInput, match=r"^it is "):
            check_option("it", value, hint)


def test_whole_numbers_of_numpy_reach_functions_as_pythons():
    @holds_to_annotations()
    def sums(*, seed: int | None = 0, count: int = 1) -> int:
        return seed + 2**32 + count * 1000

    assert sums(seed=np.uint8(3), count=np.int8(100)) == 2**32 + 100_003

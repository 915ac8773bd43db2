"""The contract suite of estimators over the registry, and over estimators that break it."""

from __future__ import annotations

import pytest
import torch

from gumbo.inference.estimators import DisARM, GumbelSoftmax, ScoreFunction, estimators
from gumbo.testing import check_estimator


@pytest.mark.parametrize("word", list(estimators))
def test_every_estimator_keeps_the_contract(word):
    check_estimator(word)


class Flipped(ScoreFunction):
    def surrogate(self, view):
        return -super().surrogate(view)


class SelfCentred(ScoreFunction):
    min_particles = 2

    def surrogate(self, view):
        return (view.cost - view.cost.mean(view.particle_dim, keepdim=True)) * view.log_prob


class SelfCentredFromTwo(SelfCentred):
    """Right with one particle, the least number that it declares."""

    min_particles = 1

    def surrogate(self, view):
        return super().surrogate(view) if view.num_particles > 1 else view.cost * view.log_prob


class Boasting(GumbelSoftmax):
    unbiased = True

    def __init__(self):
        super().__init__(1.0, hard=True)


class HalfMissing(DisARM):
    def weigh(self, gap, value, partner, uniform, logits):
        return torch.where(value > partner, super().weigh(gap, value, partner, uniform, logits), 0.0)


class CentredOnTheBatch(ScoreFunction):
    """Wrong by one part in the number of rows."""

    def surrogate(self, view):
        return (view.cost - view.cost.mean()) * view.log_prob


class OnlyInTraining(ScoreFunction):
    def surrogate(self, view):
        return (2 if view.training else 1) * super().surrogate(view)


class OnlyOneByOne(ScoreFunction):
    def surrogate(self, view):
        return len(view.fns) * super().surrogate(view)


class SlightlyLong(ScoreFunction):
    def surrogate(self, view):
        return 1.01 * super().surrogate(view)


class Greedy(ScoreFunction):
    def why_not(self, site):
        return "I would rather not"

    def supports(self, site):
        return True


@pytest.mark.parametrize(
    "wrong, says",
    [
        (Flipped(), "calls itself unbiased"),
        (SelfCentred(), "calls itself unbiased"),
        (Boasting(), "calls itself unbiased"),
        (SelfCentredFromTwo(), "with 2 particles at once calls itself unbiased"),
        (CentredOnTheBatch(), "calls itself unbiased"),
        (OnlyInTraining(), "calls itself unbiased"),
        (OnlyOneByOne(), "with 2 particles one by one calls itself unbiased"),
        (SlightlyLong(), "calls itself unbiased"),
        (HalfMissing(), "calls itself unbiased"),
        (Greedy(), "supports and why_not disagree"),
    ],
)
def test_estimators_that_break_the_contract_are_told(wrong, says):
    with pytest.raises(AssertionError, match=says):
        check_estimator(wrong)

"""The check whether the guide repeats itself at given draws, as estimators that run it again assume."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GumboError, UnsupportedSite
from ..estimators._base import Draw
from .programs import Program
from .records import Run
from .scopes import kept_buffers

CLOSE = 1e-3  # the relative difference of two terms from which they are another distribution's, and no rounding


def check_repeats(
    program: Program, seen: Run, modules: Collection[nn.Module], args: tuple, kwargs: Mapping[str, Any]
) -> None:
    """Refuse a guide whose log-probabilities differ in another run at the same draws, rows, noise and buffers.

    Three runs are compared, so that a counter of period two or three shows. The first of all runs is none of them: it
    may initialize parameters. The model is not compared: independent noise in it leaves a difference of costs unbiased.
    Scales are left out: a schedule that counts the runs is close to itself in the next one.

    Args:
        program: one particle of the programs without estimators, with their own noise separate. The runs change random
            state, which the caller restores.
        seen: an earlier run, whose draws are repeated.
        modules: the modules whose buffers stay as they are.
        args, kwargs: the programs' arguments.
    """
    program = copy.copy(program)
    program.resolve, program.lists_chains = (lambda msg: None), False  # every draw is given; none is summed out
    program.skips_unscored = True  # some flows cannot score a value that they did not draw
    draws = {site.name: site.value.detach() for site in seen.guide if site.random}

    def again(noise: Any) -> Run:
        fixed = {name: Draw(value.clone()) for name, value in draws.items()}
        with kept_buffers(*modules):
            return program.run(
                args, kwargs, fixed=fixed, subsamples=dict(seen.subsamples), noise=noise, with_model=False
            )

    try:
        first = again(None)
        others = [again(first.noise) for _ in range(2)]
    except GumboError:  # such as a site that is observed in some runs only; the call itself reports it
        return
    terms = _terms(first)
    for other in map(_terms, others):
        for name in draws:
            a, b = terms.get(name), other.get(name)
            if (a is None) != (b is None) or (a is not None and _differ(a, b)):
                raise UnsupportedSite(
                    name,
                    reason="in a second run at the same draws the guide has another distribution for it, and an"
                    " estimator here runs the guide again: draw the guide's own noise from torch's, NumPy's or"
                    " Python's global generator (no torch.Generator or numpy.random.Generator of its own), let no"
                    " counter change it from run to run, or take an estimator of a single run, such as 'score' or"
                    " 'rloo'",
                )


def _terms(run: Run) -> dict[str, Tensor]:
    """Log q of each latent site, without its scale."""
    found = {}
    for site in run.guide:
        if site.random:
            term = site.log_prob.detach()
            found[site.name] = term / site.scale
    return found


def _differ(a: Tensor, b: Tensor) -> bool:
    close = max(CLOSE, 10 * torch.finfo(a.dtype).eps)
    return a.shape != b.shape or not torch.allclose(a, b, rtol=close, atol=close, equal_nan=True)

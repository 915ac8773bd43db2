"""All thresholds of ``diagnose``."""

from __future__ import annotations

import numpy as np

# The fraction of units that may exceed a threshold before an alarm; with few units, none.
SHARE = 0.05
# The probability that any of the tests of one verdict is a false rejection.
LEVEL = 0.05

# --- importance weights
ESS = 0.1  # effective sample size, as a fraction of the draws
LEAST_TAIL = 25  # weights that the tail of k̂ needs: 125 draws
ENOUGH = 50.0  # effective draws needed for moments of weighted draws and for the evidence
BARELY = 10.0  # effective draws needed for an alarm by such a moment, but not for an ok
INNER_NOISE = 0.25  # variance of the log-evidence given a draw of the global latents, in nats²

# --- gaps, moments, collapse
GAP = 0.05  # nats for each latent dimension
WIDTH = 0.85  # ratio of standard deviations, and its inverse
SHIFT = 0.2  # posterior standard deviations
PROBABILITY = 0.05  # the shift of a binary latent; the share below a value
CORRELATION = 0.25
SURE = 1e-3  # p-value of a difference of moments, over all comparisons
COLLAPSED = 0.01  # nats of KL to the prior in each dimension

# --- calibration
UNIFORM = 1e-3  # p-value of the ranks
ROUNDING = 5e-5  # relative change of log q below which the guide does not read the data

# --- missed mass
MASS = 0.05  # the share of the posterior that the guide leaves out
KNOWN = (0.25, 0.4)  # nats of the guide's own mass that a search finds: in up to two dimensions, and in more
SELDOM = 0.05  # a share of the model's probability of a value, below which the guide hardly draws it
SEARCHED = 20  # the most dimensions in which annealing from the prior works

# --- refits
RHAT = 1.05


def allowed(count: int) -> int:
    """The number of units, of ``count``, that may exceed a threshold."""
    return int(SHARE * count)


def single(count: int, sizes: np.ndarray) -> np.ndarray:
    """The limit for the root mean square of ``sizes`` differences in one of ``count`` units, as a multiple of theirs.

    Normal differences at the limit over the units exceed it in one of them with probability ``SURE``.
    """
    from scipy.stats import chi2

    return np.sqrt(chi2.isf(SURE / count, sizes) / sizes)

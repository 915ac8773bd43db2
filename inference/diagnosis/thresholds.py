"""Every number that ``diagnose`` compares with, in one place."""

from __future__ import annotations

# A share of the units may be odd before an alarm; of few units, none.
SHARE = 0.05
# How often the tests behind one verdict may err together, where what they test holds.
LEVEL = 0.05

# --- importance weights
ESS = 0.1  # effective sample size, as a share of the draws
LEAST_TAIL = 25  # weights that the tail of k̂ needs: 125 draws
ENOUGH = 50.0  # effective draws from which moments of weighted draws, and the evidence, can be had
BARELY = 10.0  # effective draws from which such a moment may tell that the guide is wrong, not that it is right
INNER_NOISE = 0.25  # variance of the log-evidence given a draw of the global latents, in nats²

# --- gaps, moments, collapse
GAP = 0.05  # nats for each latent dimension
WIDTH = 0.85  # ratio of standard deviations, and its inverse
SHIFT = 0.2  # posterior standard deviations
PROBABILITY = 0.05  # the same for zeros and ones
CORRELATION = 0.25
SURE = 1e-3  # chance of moments as different by the noise of the weights, over all that are compared
COLLAPSED = 0.01  # nats of KL to the prior in each dimension

# --- calibration
UNIFORM = 1e-3  # chance of ranks as uneven at an exact guide
ROUNDING = 5e-5  # of log q, relative: what less than this is not reading the data

# --- missed mass
MASS = (0.25, 0.4)  # nats of evidence: in up to two dimensions, and in more
SEARCHED = 20  # dimensions beyond which particles do not find their way from the prior

# --- refits
RHAT = 1.05


def allowed(count: int) -> int:
    """How many of so many units may be odd."""
    return int(SHARE * count)

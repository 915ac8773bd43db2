"""Small demonstrations, one file each with its own options."""

from gumbo.experiments.systems._base import System, systems
from gumbo.experiments.systems.covariance import Covariance
from gumbo.experiments.systems.gumbel_max import GumbelMax
from gumbo.experiments.systems.manifold import Manifold
from gumbo.experiments.systems.natural_gradient import NaturalGradient
from gumbo.experiments.systems.policy import Policy
from gumbo.experiments.systems.regression import Regression
from gumbo.experiments.systems.semi_supervised import SemiSupervised
from gumbo.experiments.systems.warm_up import WarmUp

__all__ = [
    "Covariance",
    "GumbelMax",
    "Manifold",
    "NaturalGradient",
    "Policy",
    "Regression",
    "SemiSupervised",
    "System",
    "WarmUp",
    "systems",
]

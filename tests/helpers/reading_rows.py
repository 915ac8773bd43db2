"""Programs whose rows read other rows of the data."""

import pyro
import pyro.distributions as dist
import torch


def reading(others):
    """Rows with a mean that depends on other rows, or on their places, and the exact posterior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z + others(x), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - others(x)) / 2, 0.5**0.5))

    return model, guide

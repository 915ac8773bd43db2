"""The three workloads of step.py in JAX: NumPyro's programs, and the estimators NumPyro lacks written by hand.

Parameters are lists of ``(weight, bias)`` pairs, weights as PyTorch lays them out; ``noise`` is what _by_hand.py draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, nn
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.optim import Adam

Params = dict[str, Any]


def parameters_of(by_hand) -> Params:
    """The parameters of one of _by_hand.py's modules."""

    def layers(network):
        leaves = [leaf for leaf in network if hasattr(leaf, "weight")]
        return [(jnp.array(leaf.weight.detach().numpy()), jnp.array(leaf.bias.detach().numpy())) for leaf in leaves]

    params = {"encoder": layers(by_hand.encoder), "decoder": layers(by_hand.decoder)}
    if hasattr(by_hand, "prior"):
        params["prior"] = jnp.array(by_hand.prior.detach().numpy())
    return params


def mlp(layers, h, activation=nn.relu):
    for weight, bias in layers[:-1]:
        h = activation(h @ weight.T + bias)
    weight, bias = layers[-1]
    return h @ weight.T + bias


def log_bernoulli(logits, value):
    return (value * logits - nn.softplus(logits)).sum(-1)


class Gaussian:
    def __init__(self, by_hand, batch_size: int):
        self.min_sd, self.size = by_hand.min_sd, (batch_size, by_hand.decoder[0].in_features)

    def noise(self, key):
        return jax.random.normal(key, self.size)

    def loss(self, params: Params, x, noise):
        loc, raw = jnp.split(mlp(params["encoder"], x), 2, -1)
        scale = nn.softplus(raw) + self.min_sd
        z = loc + scale * noise
        rate = 0.5 * (z**2 - noise**2).sum() - jnp.log(scale).sum()
        return rate - log_bernoulli(mlp(params["decoder"], z), x).sum()

    def programs(self, params: Params) -> tuple[Callable, Callable, Any]:
        def model(x):
            layers = numpyro.param("decoder", params["decoder"])
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(self.size[1]), 1.0).to_event(1))
                numpyro.sample("x", dist.Bernoulli(logits=mlp(layers, z)).to_event(1), obs=x)

        def guide(x):
            loc, raw = jnp.split(mlp(numpyro.param("encoder", params["encoder"]), x), 2, -1)
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(loc, nn.softplus(raw) + self.min_sd).to_event(1))

        return model, guide, Trace_ELBO()


class Categorical:
    def __init__(self, by_hand, batch_size: int):
        self.shape, self.particles, self.batch_size = by_hand.shape, by_hand.particles, batch_size

    def noise(self, key):
        return jax.random.exponential(key, (self.particles, self.batch_size, *self.shape))

    def loss(self, params: Params, x, noise):
        log_pi = nn.log_softmax(mlp(params["encoder"], x).reshape(len(x), *self.shape))
        y = lax.stop_gradient(nn.one_hot(jnp.argmax(jnp.exp(log_pi) / noise, -1), self.shape[1]))
        log_q = (log_pi * y).sum((-2, -1))
        log_x = log_bernoulli(mlp(params["decoder"], y.reshape(*y.shape[:2], -1)), x)
        bound = lax.stop_gradient(log_x - log_q)
        baseline = (bound.sum(0) - bound) / (self.particles - 1)
        surrogate = log_x + (bound - baseline) * log_q
        return -surrogate.sum() / self.particles

    def programs(self, params: Params) -> tuple[Callable, Callable, Any]:
        def model(x):
            layers = numpyro.param("decoder", params["decoder"])
            with numpyro.plate("data", len(x)):
                y = numpyro.sample("y", dist.Categorical(logits=jnp.zeros(self.shape)).to_event(1))
                logits = mlp(layers, nn.one_hot(y, self.shape[1]).reshape(*y.shape[:-1], -1))
                numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def guide(x):
            logits = mlp(numpyro.param("encoder", params["encoder"]), x).reshape(len(x), *self.shape)
            with numpyro.plate("data", len(x)):
                numpyro.sample("y", dist.Categorical(logits=logits).to_event(1))

        return model, guide, TraceGraph_ELBO(num_particles=self.particles)


class Belief:
    def __init__(self, by_hand, batch_size: int):
        self.size = (batch_size, len(by_hand.prior))

    def noise(self, key):
        return jax.random.uniform(key, self.size)

    def loss(self, params: Params, x, noise):
        logits = mlp(params["encoder"], x)
        probs = nn.sigmoid(logits)
        z = lax.stop_gradient((noise < probs).astype(x.dtype))
        partner = lax.stop_gradient((1 - noise < probs).astype(x.dtype))

        def log_p(z):
            return log_bernoulli(params["prior"], z) + log_bernoulli(mlp(params["decoder"], z), x)

        main = log_p(z)
        gap = main - log_bernoulli(logits, z) - log_p(partner) + log_bernoulli(logits, partner)
        weight = 0.5 * gap[:, None] * (z - partner) * nn.sigmoid(jnp.abs(logits))
        return -main.sum() - (lax.stop_gradient(weight) * logits).sum()

    def programs(self, params: Params) -> tuple[Callable, Callable, Any]:
        def model(x):
            layers = numpyro.param("decoder", params["decoder"])
            prior = numpyro.param("prior", params["prior"])
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z1", dist.Bernoulli(logits=prior).to_event(1))
                numpyro.sample("x", dist.Bernoulli(logits=mlp(layers, z)).to_event(1), obs=x)

        def guide(x):
            with numpyro.plate("data", len(x)):
                numpyro.sample(
                    "z1", dist.Bernoulli(logits=mlp(numpyro.param("encoder", params["encoder"]), x)).to_event(1)
                )

        return model, guide, TraceGraph_ELBO()


def numpyro_update(workload, params: Params, lr: float) -> tuple[Callable, Any]:
    """One step of NumPyro's SVI, ``update(state, x) -> state``, and the first state's maker."""
    model, guide, elbo = workload.programs(params)
    svi = SVI(model, guide, Adam(lr), elbo)
    return lambda state, x: svi.update(state, x)[0], lambda key, x: svi.init(key, x)


def hand_update(workload, params: Params, lr: float) -> tuple[Callable, Any]:
    """The same for the estimator written by hand, under the same optimizer."""
    optimizer = Adam(lr)

    def update(state, x):
        key, optimizer_state = state
        key, now = jax.random.split(key)
        noise = workload.noise(now)
        gradient = jax.grad(workload.loss)(optimizer.get_params(optimizer_state), x, noise)
        return key, optimizer.update(gradient, optimizer_state)

    return update, lambda key, x: (key, optimizer.init(params))


def stepper(update: Callable, state: Any, x: Any, scan: bool) -> Callable[[int], None]:
    """``steps(n)`` makes n of them and waits: one by one under ``jit``, or all in one ``lax.scan``.

    As in the other rivals every step takes the same batch.
    """
    kept = {"state": state}
    one = jax.jit(update, donate_argnums=0)
    many = jax.jit(lambda state, x, n: lax.scan(lambda s, _: (update(s, x), None), state, None, n)[0], static_argnums=2)

    def steps(n: int) -> None:
        if scan:
            kept["state"] = many(kept["state"], x, n)
        else:
            for _ in range(n):
                kept["state"] = one(kept["state"], x)
        jax.block_until_ready(kept["state"])

    return steps

"""A Bayesian network whose conditionals are neural networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import one_hot

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import beside_each_other, mlp
from .families import distribution, families, num_outputs


@models.register("neural-bayes-net")
class NeuralBayesNet(GenerativeModel):
    r"""Discrete and continuous variables on a directed acyclic graph, each a network of its parents.

    .. math:: p(v) = \prod_j p(v_j \mid \mathrm{Pa}(v_j))

    ``nodes`` maps each variable to ``family`` (``normal``, ``bernoulli``, or ``categorical``: one-hot vectors),
    ``shape`` of one datum and ``parents``, names defined before or after it. Its conditional is its family's
    distribution with parameters from a network of its parents, of ``hidden`` layers; without parents, free parameters.
    ``observed`` are the variables in the data, by default all: then there are no latents, and with the guide ``none``
    every ELBO is the log-likelihood. The others are latents, for any guide of their families; ``layered`` supports
    mixed families and any graph. ``observing(...)`` is the same network with other observed variables.

    The data x are the observed variables concatenated, flattened, in the order of the graph: ``(B, size)``; ``pack``
    makes them from named tensors, ``unpack`` is its inverse. A node without a shape has ``data_shape``. Raises BadInput
    for a graph with a cycle or an unknown name, and for data that do not fit.

    Args:
        data_shape: shape of the nodes that have no ``shape``.
        nodes: the variables; None takes label → style → image, with the image observed.
        observed: names of the variables in the data; None takes all.
        hidden: widths of the hidden layers of each node's network.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        min_sd: smallest standard deviation, added to the softplus of an output.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Pearl 1988, "Probabilistic reasoning in intelligent systems"; Kingma & Welling 2013, arXiv:1312.6114, appendix F,
    for learning the conditionals.

    >>> sprinkler = {
    ...     "rain": {"family": "bernoulli", "shape": [1]},
    ...     "sprinkler": {"family": "bernoulli", "shape": [1], "parents": ["rain"]},
    ...     "moisture": {"family": "normal", "shape": [1], "parents": ["rain", "sprinkler"]},
    ... }
    >>> model = NeuralBayesNet(nodes=sprinkler, observed=["moisture"], hidden=(8,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'rain': (5, 1), 'sprinkler': (5, 1), 'moisture': (5, 1)}
    >>> everything = model.observing("rain", "sprinkler", "moisture")
    >>> everything.latents, everything.pack(**model.sample_prior(5)).shape
    ({}, torch.Size([5, 3]))
    """

    variants = (
        {
            "nodes": {
                "label": {"family": "categorical", "shape": [10]},
                "style": {"family": "normal", "shape": [3], "parents": ["label"]},
                "image": {"family": "bernoulli", "parents": ["label", "style"]},
            },
            "observed": ["image"],
            "hidden": [8],
        },
        {
            "nodes": {
                "image": {"family": "bernoulli"},
                "label": {"family": "categorical", "shape": [10], "parents": ["image"]},
                "ink": {"family": "normal", "shape": [2], "parents": ["image", "label"]},
            },
            "observed": ["image", "ink"],
            "hidden": [8],
        },
        {
            "nodes": {
                "label": {"family": "categorical", "shape": [10]},
                "image": {"family": "bernoulli", "parents": ["label"]},
            },
            "hidden": [8],
        },
    )

    def __init__(
        self,
        data_shape: Sequence[int] | None = None,
        nodes: Mapping[str, Mapping[str, Any]] | None = None,
        observed: Sequence[str] | None = None,
        hidden: Sequence[int] = (64,),
        activation: str = "tanh",
        min_sd: float = 1e-3,
        data_size: int | None = None,
    ):
        self_nodes, self_parents = read_nodes(self.variants[0]["nodes"] if nodes is None else nodes, data_shape)
        if nodes is None and observed is None:
            observed = ["image"]
        names = list(self_nodes) if observed is None else list(observed)
        for name in names:
            if name not in self_nodes:
                raise BadInput(f"NeuralBayesNet: observed {name!r} is no node (nodes: {', '.join(self_nodes)})")
        if not names:
            raise BadInput("NeuralBayesNet: observed is empty: expected at least one node")
        size = sum(self_nodes[name].size for name in names)
        super().__init__((size,), data_size)
        self.nodes, self.parents, self.min_sd = self_nodes, self_parents, min_sd
        self.observed = tuple(name for name in self.nodes if name in names)
        self.latents = {name: node for name, node in self.nodes.items() if name not in names}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.decoder = nn.ModuleDict()
        self.decoder_roots = nn.ParameterDict()
        for name, above in self.parents.items():
            outputs = num_outputs(self.nodes[name])
            if above:
                inputs = sum(self.nodes[parent].size for parent in above)
                self.decoder[name] = mlp([inputs, *hidden, outputs], activation)
            else:
                self.decoder_roots[name] = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            seen = {} if x is None else self.unpack(x)
            values: dict[str, torch.Tensor] = {}
            for name in self.nodes:
                values[name] = pyro.sample(name, self.conditional(name, values), obs=seen.get(name))
        return self.pack(**values) if x is None else x

    def conditional(self, name: str, values: Mapping[str, torch.Tensor]) -> dist.TorchDistribution:
        """p of one variable given the values ``(..., *shape)`` of its parents (further values are ignored)."""
        node, above = self.nodes[name], self.parents[name]
        if not above:
            return distribution(node, self.decoder_roots[name], min_sd=self.min_sd)
        parts = [values[parent].flatten(-len(self.nodes[parent].shape)) for parent in above]
        return distribution(node, self.decoder[name](beside_each_other(parts)), min_sd=self.min_sd)

    def pack(self, **values: torch.Tensor) -> torch.Tensor:
        """The observed variables ``(B, *shape)`` as one tensor ``(B, size)``; latent ones are left out."""
        for name in self.observed:
            if name not in values:
                raise BadInput(f"NeuralBayesNet: {name!r} is observed, and not given")
            self.check_shape(name, values[name], (len(values[name]), *self.nodes[name].shape))
        return torch.cat([values[name].flatten(1) for name in self.observed], -1)

    def unpack(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The observed variables of packed data, by name."""
        nodes = [self.nodes[name] for name in self.observed]
        parts = x.split([node.size for node in nodes], -1)
        return {n: p.unflatten(-1, node.shape) for n, p, node in zip(self.observed, parts, nodes, strict=True)}

    def observing(self, *names: str) -> NeuralBayesNet:
        """The same network, parameters shared, with these variables observed."""
        twin = type(self)(**{**self.config, "observed": list(names)})
        twin.decoder, twin.decoder_roots = self.decoder, self.decoder_roots
        return twin

    def check_values(self, x: torch.Tensor) -> None:
        super().check_values(x)
        for name, value in self.unpack(x).items():
            family = self.nodes[name].family
            if not families[family].support.check(value).all():
                raise BadInput(f"NeuralBayesNet: {name!r} is {family}, and its data hold other values than 0 and 1")

    def example(self, rows: int = 2) -> dict[str, torch.Tensor]:
        return {"x": self.pack(**self.sample_prior(rows))}

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Images as the node ``image``, labels, one-hot, as the node ``label``, and a mean over pixels as ``ink``."""
        values = {"image": images}
        if labels is not None and "label" in self.observed:
            values["label"] = one_hot(labels, self.nodes["label"].size).to(images.dtype)
        if "ink" in self.observed:
            values["ink"] = images.flatten(1).mean(1, keepdim=True).expand(-1, self.nodes["ink"].size)
        return {"x": self.pack(**values)}


def read_nodes(
    nodes: Mapping[str, Mapping[str, Any]], data_shape: Sequence[int] | None
) -> tuple[dict[str, Latent], dict[str, tuple[str, ...]]]:
    """Each node's latent declaration, and its parents, in topological order; BadInput for an invalid graph."""
    found: dict[str, Latent] = {}
    parents: dict[str, tuple[str, ...]] = {}
    for name, node in nodes.items():
        unknown = set(node) - {"family", "shape", "parents"}
        if unknown or "family" not in node:
            raise BadInput(f"node {name!r}: expected family, shape and parents, got {', '.join(node) or 'nothing'}")
        known = [word for word, family in families.items() if family.relaxes is None]
        if node["family"] not in known:
            raise BadInput(f"node {name!r} has family {node['family']!r}: expected one of {', '.join(known)}")
        shape = node.get("shape", data_shape)
        if not shape or min(shape) < 1:
            raise BadInput(f"node {name!r} needs a shape of positive sizes, or a data_shape to take it from")
        found[name] = Latent(node["family"], tuple(shape))
        parents[name] = tuple(node.get("parents", ()))
    for name, above in parents.items():
        for parent in above:
            if parent not in found:
                raise BadInput(f"node {name!r} has a parent {parent!r}, which is no node (nodes: {', '.join(found)})")
    ordered: dict[str, Latent] = {}
    while len(ordered) < len(found):
        ready = [n for n in found if n not in ordered and all(parent in ordered for parent in parents[n])]
        if not ready:
            raise BadInput(f"the nodes {', '.join(n for n in found if n not in ordered)} form a cycle")
        ordered |= {name: found[name] for name in ready}
    return ordered, {name: parents[name] for name in ordered}

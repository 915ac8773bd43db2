"""A user's Pyro programs in place of models of the collection, and guides made for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from gumbo.errors import BadInput
from gumbo.experiments._names import program
from gumbo.options import check_known
from gumbo.registry import Registry, is_import_path

AMORTIZE = "amortize"
ROWS = 64  # rows of the training data for the inspection of a program


class OwnProgram(PyroModule):
    """A Pyro program with the interface of a model: its first argument is the images, one named ``labels`` the labels.

    ``latents`` are the names of its latent sites, after a guide was made for it.
    """

    plain_networks = False
    x_is_given = True  # its draws are unknown, so that there are no pictures
    observed: tuple[str, ...] = ()
    label_site = None

    def __init__(self, own: Callable, name: str):
        super().__init__()
        try:
            called = own.forward if isinstance(own, nn.Module) else own
            parameters = list(inspect.signature(called).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if not places:
            raise BadInput(f"model {name!r} takes no argument: expected a Pyro program of a batch of data")
        self._own = (own,) if not isinstance(own, nn.Module) else None
        self.own = own if isinstance(own, nn.Module) else None
        self.first, self.takes = places[0].name, {p.name for p in parameters}
        self.latents: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.own if self._own is None else self._own[0])(*args, **kwargs)

    def inputs(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The keywords of a call."""
        beside = {"labels": labels} if labels is not None and "labels" in self.takes else {}
        return {self.first: images} | beside


def own_model(registry: Registry[Any], name: str) -> Callable | None:
    """The program at an import path, unless it is a model of the collection's type."""
    if not is_import_path(name):
        return None
    found = program(registry, name)
    return None if registry.expected is not None and not registry.expected(found) else found


def amortized(model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]):
    """The guide of `amortize` for a model and some rows of its data."""
    from gumbo.guides import amortize

    check_known(f"guide {AMORTIZE!r}", options, ("hidden", "dependencies", "order"))
    guide = amortize(model, **inputs, **{"quiet": True, **options})
    if isinstance(model, OwnProgram):
        model.latents = {decision.site: decision for decision in guide.decisions if decision.scope != "summed out"}
    return guide

"""gumbo (Gumbel + ELBO): deep generative models and amortized guides in Pyro, with a gradient estimator per site."""

from __future__ import annotations

import importlib

from ._version import __version__

# Loaded on first access: `import gumbo` does not import torch and pyro.
_ROOMS = ("errors", "models", "guides", "inference", "experiments", "testing")
_NAMES = (
    dict.fromkeys(("SiteELBO", "audit", "diagnose", "evaluate", "fit", "predict", "to_arviz", "summary"), "inference")
    | dict.fromkeys(("GumboError", "BadInput", "UnknownName", "UnsupportedSite"), "errors")
    | {"load": "experiments._loading"}
)

__all__ = ["__version__", *_ROOMS, *_NAMES]


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

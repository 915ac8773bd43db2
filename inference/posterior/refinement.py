"""Refining an amortized guide datum by datum: what the encoder's one look at the data left on the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, transform_to

from ...errors import BadInput, UnsupportedSite
from ..engine.rows import Rows
from ..engine.scopes import device_of, modes_kept, modules_of, private_seed, private_store
from ..estimators import Estimator
from .evaluation import exact_pair, log_weights
from .refits import loss_of

# What a family is refined in; of two ways to say the same, logits.
PARAMETERS = ("loc", "scale", "scale_tril", "logits", "rate", "concentration", "concentration0", "concentration1")


class RefinedGuide(PyroModule):
    """A guide with an offset for each datum: it draws as the guide does, from parameters that are moved a little.

    The offsets are added in unconstrained coordinates to the parameters of each local site's distribution, and start at
    zero, where this is the guide itself; a site keeps what it depends on. A distribution without parameters of its own
    (a flow) is refined through the features that ``guide.encoder`` gives it.

    It is bound to the rows it was made from: call it with those, all of them, in their order. ``offsets`` are its own
    parameters; the guide's are shared. Made by `refine`.
    """

    def __init__(self, guide: nn.Module, data: object):
        super().__init__()
        rows = Rows(data).check("data")
        self.guide, self.num_rows = guide, len(rows)
        self.offsets = nn.ParameterDict()
        seen = _Sites()
        with torch.no_grad(), private_store(guide), private_seed(None, guide), seen:
            guide(*rows.args, **rows.kwargs)
        for name, fn in seen.found.items():
            if fn.batch_shape[-1:] != (len(rows),):
                continue
            own = free_parameters(fn)
            if not own and not isinstance(getattr(guide, "encoder", None), nn.Module):
                raise UnsupportedSite(name, "refinement", f"{type(fn).__name__} has no parameters that can be moved")
            for key, value in own.items():
                self.offsets[f"{name}/{key}"] = nn.Parameter(torch.zeros_like(value))
            if not own:
                with torch.no_grad(), _shifted_features(guide, None) as features, private_store(guide):
                    guide(*rows.args, **rows.kwargs)
                self.offsets["/features"] = nn.Parameter(torch.zeros_like(features[0]))
        if not self.offsets:
            raise BadInput("the guide draws nothing for single data, so that there is nothing to refine datum by datum")

    def forward(self, *args, **kwargs):
        rows = len(Rows.of(args, kwargs))
        if rows != self.num_rows:
            raise BadInput(f"this guide is refined for {self.num_rows} data, and was given {rows}: give it the same")
        features = self.offsets.get("/features")
        with _Shift(self.offsets):
            if features is None:
                return self.guide(*args, **kwargs)
            with _shifted_features(self.guide, features):
                return self.guide(*args, **kwargs)


def refine(
    model: Callable,
    guide: nn.Module,
    data: object,
    *,
    steps: int = 100,
    lr: float = 0.03,
    estimator: str | Estimator | Mapping[str, str | Estimator] = "default",
    num_particles: int | None = 8,
    seed: int | None = 0,
) -> RefinedGuide:
    """Optimise the guide for each of these data by itself, from where amortization puts it; model and guide stay.

    ``steps`` of Adam, its rate falling from ``lr`` to zero, on the bound of the given rows, of which ``num_particles``
    draws are taken a step, differentiated as the word ``estimator`` says (of `SiteELBO`).
    Semi-amortized inference: Kim et al. 2018, arXiv:1802.02550; Hjelm et al. 2016, arXiv:1511.06382. All rows are
    optimised at once. Raises BadInput for data or settings that cannot be used, and UnsupportedSite for a site without
    parameters, or one that the estimator cannot serve.

    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,), likelihood="bernoulli")
    >>> x = torch.ones(3, 1, 4, 4)
    >>> refined = refine(model, NormalGuide(model, hidden=(8,)), x, steps=5)
    >>> {name: tuple(offset.shape) for name, offset in refined.offsets.items()}
    {'z/loc': (3, 2), 'z/scale': (3, 2)}
    """
    if steps < 0 or not lr > 0:
        raise BadInput(f"refine: steps={steps} and lr={lr}: expected at least 0 steps and a positive learning rate")
    rows = Rows(data).check("data").to(device_of(model, guide))
    refined = RefinedGuide(guide, rows)
    offsets = list(refined.offsets.values())
    optimizer = torch.optim.Adam(offsets, lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with private_store(model, refined), private_seed(seed, model, guide), modes_kept(model, guide):
        for module in modules_of(model, guide):
            module.eval()
        loss = loss_of(estimator, num_particles, model, refined, rows.args, rows.kwargs)
        for _ in range(steps):
            # Only the offsets: nothing is added to the gradients of the model's and the guide's parameters.
            slopes = torch.autograd.grad(loss(*rows.args, **rows.kwargs), offsets, allow_unused=True)
            for offset, slope in zip(offsets, slopes, strict=True):
                offset.grad = slope
            optimizer.step()
            falling.step()
    return refined


@dataclass(frozen=True)
class Refinement:
    """Per-datum bounds in nats, ``(N,)`` each: of the amortized guide, and of the guide refined for each datum.

    ``gap`` is their difference. Where steps were enough to reach the best of the family for each datum, it is the
    amortization gap.
    """

    amortized: Tensor
    refined: Tensor

    @property
    def gap(self) -> Tensor:
        return self.refined - self.amortized


def refinement_gap(
    model: Callable,
    guide: nn.Module,
    data: object,
    *,
    steps: int = 100,
    lr: float = 0.03,
    estimator: str | Estimator | Mapping[str, str | Estimator] = "default",
    num_particles: int | None = 8,
    num_samples: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> Refinement:
    """What refinement gains on each datum: the true bound before and after.

    Cremer, Li & Duvenaud 2018, "Inference suboptimality in variational autoencoders", arXiv:1801.03558. A relaxed pair
    is judged by its discrete form. Arguments as in `refine` and `evaluate`; raises what they raise.

    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,), likelihood="bernoulli")
    >>> found = refinement_gap(model, NormalGuide(model, hidden=(8,)), torch.ones(3, 1, 4, 4), steps=50, num_samples=20)
    >>> found.gap.shape, bool(found.gap.mean() > 0)
    (torch.Size([3]), True)
    """
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}: expected at least 1")
    rows = Rows(data).check("data")
    with private_seed(None, model, guide):
        model, guide = exact_pair(model, guide)
    before, after = [], []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        refined = refine(
            model, guide, batch, steps=steps, lr=lr, estimator=estimator, num_particles=num_particles, seed=seed
        )
        for bounds, program in ((before, guide), (after, refined)):
            # Other noise than was optimised on, which would flatter the refined guide.
            bounds.append(_bounds(model, program, batch, num_samples, seed + 1))
    return Refinement(torch.cat(before), torch.cat(after))


def _bounds(model: Callable, guide: Callable, batch: Rows, num_samples: int, seed: int) -> Tensor:
    parts = log_weights(model, guide, batch, num_samples=num_samples, batch_size=len(batch), seed=seed)
    weights = parts["log_prior"] + parts["log_likelihood"] - parts["log_q"] + parts["log_global"]
    return weights.mean(0)


# --- distributions with moved parameters


def free_parameters(fn: Distribution) -> dict[str, Tensor]:
    """The parameters of a distribution, behind any ``to_event``, in unconstrained coordinates; none for a flow.

    >>> import pyro.distributions as dist
    >>> free_parameters(dist.Normal(torch.tensor([1.0]), torch.tensor([1.0])).to_event(1))
    {'loc': tensor([1.]), 'scale': tensor([0.])}
    """
    fn = _elementary(fn)
    constraints = getattr(type(fn), "arg_constraints", {})
    names = [name for name in PARAMETERS if name in constraints and name in _says(fn)]
    return {name: transform_to(constraints[name]).inv(getattr(fn, name)) for name in names}


def _says(fn: Distribution) -> set[str]:
    """The parameters that a distribution can be made from, besides what else it is made from."""
    return {"logits"} if hasattr(fn, "logits") else set(type(fn).arg_constraints)


def shifted(fn: Distribution, offsets: Mapping[str, Tensor]) -> Distribution:
    """The same distribution with offsets added to its unconstrained parameters."""
    if isinstance(fn, Independent):
        moved = shifted(fn.base_dist, offsets)
        return moved.to_event(fn.reinterpreted_batch_ndims)
    constraints = type(fn).arg_constraints
    moved = {}
    for name, value in free_parameters(fn).items():
        moved[name] = transform_to(constraints[name])(value + offsets[name])
    others = {name: getattr(fn, name) for name in ("temperature", "total_count") if hasattr(fn, name)}
    return type(fn)(**others, **moved)


def _elementary(fn: Distribution) -> Distribution:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


class _Sites(Messenger):
    """Remembers the distribution of each latent site that runs inside."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, Distribution] = {}

    def _pyro_post_sample(self, msg) -> None:
        if not (msg["is_observed"] or msg["infer"].get("_deterministic") or site_is_subsample(msg)):
            self.found[msg["name"]] = msg["fn"]


class _Shift(Messenger):
    """Moves the parameters of each site that has offsets."""

    def __init__(self, offsets: Mapping[str, Tensor]):
        super().__init__()
        self.by_site: dict[str, dict[str, Tensor]] = {}
        for key, offset in offsets.items():
            site, _, name = key.rpartition("/")
            if site:
                self.by_site.setdefault(site, {})[name] = offset

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.by_site and not msg["is_observed"]:
            msg["fn"] = shifted(msg["fn"], self.by_site[msg["name"]])


@contextmanager
def _shifted_features(guide: nn.Module, offset: Tensor | None):
    """Adds an offset to what ``guide.encoder`` gives; the list that it yields collects what that was."""
    seen: list[Tensor] = []

    def hook(module, inputs, output):
        seen.append(output)
        return output if offset is None else output + offset

    handle = guide.encoder.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


__all__ = ["Refinement", "RefinedGuide", "refine", "refinement_gap"]

"""Contract suites: checks of models, guides, estimators and objectives, for gumbo's and other classes.

Each check takes an instance and a batch, and raises AssertionError with a one-line reason at the first fault. They
work on copies: the objects, the param store and the random state do not change.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn import Module

from ._check_estimator import check_estimator
from ._check_objective import check_objective
from .errors import BadInput, first_line
from .models.families import families

if TYPE_CHECKING:
    from .guides._base import AnyGuide
    from .models._base import GenerativeModel

__all__ = ["check_estimator", "check_guide", "check_model", "check_objective"]

PARTICLES = 3


def check_model(model: GenerativeModel, x: Tensor, /, **conditions: Tensor) -> None:
    """Test that a model satisfies its interface, with validation on.

    Checked, in this order:

    - parameters are named ``decoder…``, so that no name of a guide collides with them;
    - with 1 and with B rows: every latent in ``model.latents`` is drawn with its shape and inside the support of its
      family, there is no undeclared site, every site in ``model.observed`` is observed, log-probabilities are finite,
      local sites have one per row and are in the plate ``"data"`` at dim -1 only, global ones are in no plate;
    - without data the model draws its observed sites, in the shape of the data;
    - a row's log-probability is the same alone, in the batch, and as one of 3 particles in a plate at dim -2;
    - a finite gradient reaches every parameter;
    - a copy built from ``model.config`` that loads the saved state gives the same numbers;
    - after ``.double()`` everything is float64, and after ``.to("meta")`` no tensor is on another device;
    - a batch of another shape, without rows or with NaN raises a one-line `BadInput`.

    Args:
        model: the model; a copy of it is checked.
        x: a batch that it accepts, ``(B, *data_shape)`` with B at least 2.
        conditions: its keywords besides ``x``, targets included: tensors with B rows.

    Returns:
        None.

    Raises:
        AssertionError: at the first fault, with a one-line reason.

    >>> from gumbo.models import GaussianVAE
    >>> check_model(GaussianVAE((1, 8, 8), latent_dim=2, hidden=(8,)), torch.randint(2, (4, 1, 8, 8)).float())
    """
    who = type(model).__name__
    _require(len(x) > 1, who, "the check needs a batch of at least two rows")
    with _isolated():
        model = copy.deepcopy(model)
        _check_names(model, "decoder", who)
        for rows in (1, len(x)):
            with _running(who, f"with {rows} rows"):
                trace = _trace(model, x[:rows], **_first(conditions, rows))
            _check_sites(trace, model, rows, who)
            for name in model.observed:
                seen = name in trace.nodes and trace.nodes[name]["is_observed"]
                _require(seen, who, f"does not observe {name} at the site {name!r}")
        _check_unobserved(model, trace, x, conditions, who)
        _check_rows_and_particles(model, trace, x, conditions, who)
        if any(True for _ in model.parameters()):
            cast(Tensor, trace.log_prob_sum()).backward()
        _check_gradients({who: model})
        _check_save_and_load(model, [], trace, x, conditions, who)
        wide = copy.deepcopy(model).double()
        with _running(who, "in float64"):
            _check_dtype(_trace(wide, x.double(), **_double(conditions)), torch.float64, who, model.summed)
        with _off_device(), _running(who, "on another device (it makes a tensor without saying on which?)"):
            moved = _trace(copy.deepcopy(model).to("meta"), x.to("meta"), **_to_meta(conditions))
            _check_device(moved, who)
        _check_bad_input(model, x, conditions, who)


def check_guide(guide: AnyGuide, model: GenerativeModel, x: Tensor, /, **conditions: Tensor) -> None:
    """Test that a guide satisfies its interface, with its model, with validation on.

    Checked, in this order:

    - parameters are named ``encoder…``, and none has the name of a parameter of the model;
    - with 1 and with B rows: every latent in ``model.latents`` is drawn with its shape, inside the support of its
      family and in the model's plate; other sites are in ``guide.auxiliary``; the draws are returned as a dict from
      site to value; the model accepts them;
    - a row's log-probability is the same alone, in the batch, and as one of 3 particles in a plate at dim -2;
    - under stock ``SVI`` with ``Trace_ELBO`` (``TraceEnum_ELBO`` for a model that sums sites out) the loss is finite,
      a gradient reaches every parameter of the pair, and two steps change each of them;
    - a copy built from the model and ``guide.config`` that loads the saved state gives the same numbers;
    - after ``.double()`` everything is float64, and after ``.to("meta")`` no tensor is on another device;
    - a batch of another shape, without rows or with NaN raises a one-line `BadInput`.

    Args:
        guide: the guide; a copy of it is checked.
        model: its model; a copy of it is used.
        x: a batch that both accept, ``(B, *data_shape)`` with B at least 2.
        conditions: the keywords of both besides ``x``: tensors with B rows.

    Returns:
        None.

    Raises:
        AssertionError: at the first fault, with a one-line reason.

    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 8, 8), latent_dim=2, hidden=(8,))
    >>> check_guide(NormalGuide(model, hidden=(8,)), model, torch.randint(2, (4, 1, 8, 8)).float())
    """
    who = type(guide).__name__
    _require(len(x) > 1, who, "the check needs a batch of at least two rows")
    with _isolated():
        guide, model = copy.deepcopy((guide, model))
        _check_names(guide, "encoder", who)
        shared = {name for name, _ in guide.named_parameters()} & {name for name, _ in model.named_parameters()}
        _require(not shared, who, f"shares parameter names with the model: {', '.join(sorted(shared))}")
        for rows in (1, len(x)):
            with _running(who, f"with {rows} rows"):
                trace = _trace(guide, x[:rows], **_first(conditions, rows))
            _check_sites(trace, model, rows, who, guide.auxiliary)
            _check_returned(trace, model, who)
            with _running(type(model).__name__, f"at draws of {who}"):
                _check_sites(_replay(model, trace, x[:rows], **_first(conditions, rows)), model, rows, who)
        _check_rows_and_particles(guide, trace, x, conditions, who)
        _check_pair_trains(guide, model, x, conditions, who)
        _check_save_and_load(guide, [model], trace, x, conditions, who)
        with _running(who, "in float64"):
            wide = _trace(copy.deepcopy(guide).double(), x.double(), **_double(conditions))
        _check_dtype(wide, torch.float64, who)
        with _off_device(), _running(who, "on another device (it makes a tensor without saying on which?)"):
            _check_device(_trace(copy.deepcopy(guide).to("meta"), x.to("meta"), **_to_meta(conditions)), who)
        _check_bad_input(guide, x, conditions, who)


# --- single promises ------------------------------------------------------------------------------------------------


def _check_names(module: Module, prefix: str, who: str) -> None:
    for name, _ in module.named_parameters():
        _require(name.startswith(prefix), who, f"parameter {name!r} must be called {prefix}…, else names can collide")


def _check_unobserved(model: GenerativeModel, trace: poutine.Trace, x: Tensor, conditions: dict, who: str) -> None:
    """Without data the model draws its observed sites, in the shape of the data."""
    free = {name: value for name, value in _first(conditions, 2).items() if name not in model.targets}
    call = {"x": x[:2]} if model.x_is_given else {"batch_size": 2}
    with _running(who, f"unobserved, called with {next(iter(call))} and no data"):
        prior = _trace(model, **call, **free)
    _check_sites(prior, model, 2, who)
    for name in model.observed:
        expected = (2, *trace.nodes[name]["value"].shape[1:])
        _require(prior.nodes[name]["value"].shape == expected, who, f"draws {name} of another shape than the data's")


def _check_sites(
    trace: poutine.Trace, model: GenerativeModel, rows: int, who: str, auxiliary: tuple[str, ...] = ()
) -> None:
    """Declared sites exist with their shapes and supports, local ones are in the plate, and all values are finite."""
    for name, latent in model.latents.items():
        _require(name in trace.nodes, who, f"never samples the declared latent {name!r}")
        value, expected = trace.nodes[name]["value"], ((rows, *latent.shape) if latent.local else latent.shape)
        _require(value.shape == expected, who, f"site {name!r} has shape {tuple(value.shape)}, expected {expected}")
        within = bool(families[latent.family].support.check(value).all())
        _require(within, who, f"site {name!r} leaves the support of {latent.family} latents")
    for name, site in _sites(trace):
        known = name in (*model.latents, *model.observed, *model.summed, *auxiliary)
        _require(known, who, f"samples {name!r}, which the model does not declare")
        log_prob = site["log_prob"]
        _require(log_prob.isfinite().all(), who, f"log-probability at {name!r} is not finite")
        if name in auxiliary:
            continue
        local = name not in model.latents or model.latents[name].local
        plates = [(frame.name, frame.dim) for frame in site["cond_indep_stack"]]
        where = "must be in the plate 'data' at dim -1 only" if local else "is global and must be in no plate"
        _require(plates == ([("data", -1)] if local else []), who, f"site {name!r} {where}")
        expected = (rows,) if local else ()
        _require(log_prob.shape == expected, who, f"log-probability at {name!r} has shape {tuple(log_prob.shape)}")


def _check_returned(trace: poutine.Trace, model: GenerativeModel, who: str) -> None:
    returned: Any = trace.nodes["_RETURN"]["value"]
    _require(isinstance(returned, dict), who, "must return its draws as a dict from site to value")
    for name in model.latents:
        same = name in returned and returned[name] is trace.nodes[name]["value"]
        _require(same, who, f"must return its draw of {name!r} under that name")


def _check_rows_and_particles(module: Module, trace: poutine.Trace, x: Tensor, conditions: dict, who: str) -> None:
    """Each row's log-probability is the same alone, in the batch, and as one of several particles."""
    local = {name for name, site in _sites(trace) if site["cond_indep_stack"]}
    batch = _log_probs(trace)
    with _running(who, "row by row"):
        alone = [
            _log_probs(_replay(module, _pick(trace, i), x[i : i + 1], **_one(conditions, i))) for i in range(len(x))
        ]
    for name in local:
        rows = torch.cat([one[name] for one in alone])
        _require(_close(rows, batch[name]), who, f"site {name!r}: a row's log-probability depends on the other rows")
    vectorized = _in_particles(module)
    with _running(who, f"with {PARTICLES} particles in a plate at dim -2"):
        several = _trace(vectorized, x, **conditions)
    for name, site in _sites(several):
        shape, expected = tuple(site["log_prob"].shape), (PARTICLES, len(x) if name in local else 1)
        _require(shape == expected, who, f"site {name!r} has log-probabilities {shape} for particles, not {expected}")
    for k in range(PARTICLES):
        one = _log_probs(_replay(module, _pick(several, k, keep=False), x, **conditions))
        for name, log_prob in one.items():
            same = _close(several.nodes[name]["log_prob"][k], log_prob)
            _require(same, who, f"site {name!r} means something else for {PARTICLES} particles than for one")


def _check_pair_trains(guide: AnyGuide, model: GenerativeModel, x: Tensor, conditions: dict, who: str) -> None:
    """Stock SVI reaches and changes every parameter of the pair."""
    pair = {who: guide, type(model).__name__: model}
    before = {name: copy.deepcopy(module.state_dict()) for name, module in pair.items()}
    with _running(who, "under stock SVI with Pyro's own ELBO"):
        elbo = Trace_ELBO(PARTICLES) if not model.summed else TraceEnum_ELBO(PARTICLES, max_plate_nesting=1)
        svi = SVI(model, guide, Adam({"lr": 1e-3}), elbo)
        with poutine.block():
            loss = elbo.differentiable_loss(model, guide, x, **conditions)
        loss.backward()
        _require(bool(loss.isfinite()), who, "stock Trace_ELBO is not finite")
        _check_gradients(pair)
        for _ in range(2):
            svi.step(x, **conditions)
    for owner, module in pair.items():
        for name, parameter in module.named_parameters():
            moved = not torch.equal(parameter, before[owner][name])
            _require(moved, owner, f"two stock SVI steps leave parameter {name!r} where it was")


def _check_gradients(modules: dict[str, Module]) -> None:
    for who, module in modules.items():
        for name, parameter in module.named_parameters():
            gradient = parameter.grad
            _require(gradient is not None and gradient.any(), who, f"no gradient reaches parameter {name!r}")
            _require(gradient.isfinite().all(), who, f"the gradient at parameter {name!r} is not finite")
    for module in modules.values():  # after all are checked: a guide may share a network with its model
        module.zero_grad()


def _check_save_and_load(
    module: Module, arguments: list, trace: poutine.Trace, x: Tensor, conditions: dict, who: str
) -> None:
    """A copy built from ``config`` gives the same numbers after it has loaded the state, without unpickling code."""
    module, file = copy.deepcopy(module), io.BytesIO()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(module.state_dict(), file)
    file.seek(0)
    with _running(who, "when it is built again from its config and loads its state"):
        twin = type(module)(*arguments, **cast(Any, module).config)
        twin.load_state_dict(torch.load(file, weights_only=True))
    before, after = (_log_probs(_replay(one, trace, x, **conditions)) for one in (module, twin))
    for name in before:
        same = torch.equal(before[name], after[name])
        _require(same, who, f"site {name!r} gives other numbers once saved, built again and loaded")


def _check_dtype(trace: poutine.Trace, dtype: torch.dtype, who: str, whole: tuple[str, ...] = ()) -> None:
    """``whole`` are sites whose values may be integers of any dtype."""
    for name, site in _sites(trace):
        for what, tensor in (("value", site["value"]), ("log-probability", site["log_prob"])):
            if what == "value" and name in whole:
                continue
            _require(tensor.dtype == dtype, who, f"{what} at {name!r} is {tensor.dtype} after .double()")


def _check_device(trace: poutine.Trace, who: str) -> None:
    for name, site in _sites(trace):
        device = site["log_prob"].device.type
        _require(device == "meta", who, f"log-probability at {name!r} is on {device} though everything was moved")


def _check_bad_input(module: Module, x: Tensor, conditions: dict, who: str) -> None:
    bad = {"another shape": x[..., :-1], "no rows": x[:0], "NaN in it": x * float("nan")}
    for what, batch in bad.items():
        try:
            module(batch, **_first(conditions, len(batch)))
        except BadInput as error:
            _require("\n" not in str(error), who, f"says more than one line of a batch with {what}")
        except Exception as error:
            _fail(who, f"raises {type(error).__name__} instead of BadInput for a batch with {what}", error)
        else:
            _fail(who, f"takes a batch with {what} without a word")


# --- tools ------------------------------------------------------------------------------------------------------------


def _fail(who: str, what: str, cause: Exception | None = None) -> None:
    raise AssertionError(f"{who}: {what}") from cause


def _require(condition: object, who: str, what: str) -> None:
    if not condition:
        _fail(who, what)


@contextmanager
def _running(who: str, when: str) -> Iterator[None]:
    """Turn any error of a program into one line that names the step."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        _fail(who, f"fails {when}: {first_line(error, kind=True)}", error)


@contextmanager
def _isolated() -> Iterator[None]:
    """A private param store and random state, with validation on, and Pyro's default for module parameters."""
    settings = pyro.settings.context(module_local_params=False)
    with pyro.get_param_store().scope(), torch.random.fork_rng(), pyro.validation_enabled(True), settings:
        yield


@contextmanager
def _off_device() -> Iterator[None]:
    """For runs on the meta device, which has shapes without values: validation would read values."""
    with pyro.validation_enabled(False), torch.no_grad(), _UnreadDraws():
        yield


class _UnreadDraws(Messenger):
    """Skips draws that torch cannot make without values: a rejection loop, a kernel for numbers only."""

    def _pyro_sample(self, msg) -> None:
        base = msg["fn"]
        while isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        if msg["value"] is None and isinstance(base, _NEED_VALUES):
            msg["value"] = torch.empty(base.shape(), device="meta")


# Gamma and Poisson draws, and distributions based on them, are of this kind since about torch 2.5.
_NAMES = ("VonMises", "Beta", "Dirichlet", "Binomial", "Gamma", "NegativeBinomial", "Poisson")
_NEED_VALUES = tuple(getattr(torch.distributions, name) for name in _NAMES)


def _trace(program, *args, **kwargs) -> poutine.Trace:
    # A separate store: a run in float64 must not see parameters of a run in float32.
    with pyro.get_param_store().scope():
        trace = poutine.trace(program).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


def _replay(program, trace: poutine.Trace, *args, **kwargs) -> poutine.Trace:
    return _trace(poutine.replay(program, trace=trace), *args, **kwargs)


def _sites(trace: poutine.Trace) -> list[tuple[str, Any]]:
    """The sample sites, without those of plates."""
    return [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]


def _log_probs(trace: poutine.Trace) -> dict[str, Tensor]:
    return {name: site["log_prob"].detach() for name, site in _sites(trace)}


def _pick(trace: poutine.Trace, index: int, keep: bool = True) -> poutine.Trace:
    """A trace of the latent values at one index of the first dimension, for replays; a global value has no rows."""
    picked = poutine.Trace()
    for name, site in _sites(trace):
        if not site["is_observed"]:
            value = site["value"].detach()
            value = value.narrow(0, index, 1) if site["cond_indep_stack"] else value
            picked.add_node(name, **{**site, "value": value if keep else value.squeeze(0)})
    return picked


def _in_particles(program):
    def vectorized(*args, **kwargs):
        with pyro.plate("particles", PARTICLES, dim=-2):
            return program(*args, **kwargs)

    return vectorized


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def _first(conditions: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: value[:rows] for name, value in conditions.items()}


def _one(conditions: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in conditions.items()}


def _double(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: value.double() if value.is_floating_point() else value for n, value in conditions.items()}


def _to_meta(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("meta") for name, value in conditions.items()}

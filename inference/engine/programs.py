"""Runs of a model and a guide under estimators: draws, replays, particles, enumerated values, and their records.

The batch dimensions of every recorded log-probability are ``(…enumerated, K, *plates)``: the rightmost
``max_plate_nesting`` dimensions belong to plates, the next to the K particles, and every enumerated site has one of its
own further left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...errors import ANY, BadInput, CallsAutograd, GumboError, UnsupportedSite, first_line
from ..estimators._base import Draw, Estimator
from ..estimators._distributions import (
    describe,
    elementary,
    has_own_mask,
    has_score_term,
    has_transforms,
    is_deterministic,
    is_discrete,
    log_prob_of,
    score_log_prob,
    score_term,
)
from .contraction import MEMORY_LIMIT, Memory
from .elimination import Listing, Symbols, Terms, expected, plates_of
from .handlers import Draws, Recorder, Replay, SharedSubsamples, StandIn, nesting, too_many
from .records import PARTICLES, Frames, Run, Site
from .resolution import Detached
from .streams import Generators, OwnNoise


class Misfit(BadInput):
    """A plate or a parameter of the wrong size, found by Pyro's own statement."""


ENOUGH_PATHS = 64  # after this many, the total is extrapolated from the fraction of values covered


class Program:
    """A model and a guide, with the options of their runs.

    Args:
        model, guide: the programs.
        resolve: the estimator of a site, or None.
        num_particles: K.
        max_plate_nesting: the depth of nested plates; None: the first run, of one particle, determines it.
        vectorized: whether the particles run at once, along a dimension, or one by one.
        joint: the enumerated sites whose values are enumerated jointly over their plates.
        enum_dims: the dimension of each enumerated site; runs add to it.
        step: the number of earlier training steps.
        generators: keep the programs' own noise separate from the sites' draws, so that it can be repeated; None does
            not.
        memory_limit: the bytes that enumerated values may hold.
        lists_chains: whether enumerated sites of the guide under ``pyro.markov`` are summed out by elimination.
        kl_weight: the weight of the latent terms in these sums.
        shares_dims: whether the elements of a sequential plate are enumerated along the same dimensions.
        largest: the bytes of the largest statement of one particle.

    Attributes:
        eliminates: whether enumerated sites of the model that the guide does not sample are summed out. Otherwise, and
            in the run that determines the nesting, they are drawn from the model.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *,
        resolve: Callable[[Any], Estimator | None],
        num_particles: int,
        max_plate_nesting: int | None,
        vectorized: bool,
        joint: set[str] | None = None,
        enum_dims: dict[str, int] | None = None,
        step: int = 0,
        generators: Generators | None = None,
        memory_limit: float = MEMORY_LIMIT,
        lists_chains: bool = False,
        kl_weight: Any = 1.0,
        shares_dims: bool = True,
        largest: int = 1,
    ):
        self.shares_dims, self.largest = shares_dims, largest
        self.memory = Memory(memory_limit)
        self.model, self.guide, self.resolve = model, guide, resolve
        self.lists_chains, self.kl_weight = lists_chains, kl_weight
        self.memory_limit, self.eliminates = memory_limit, True
        self.num_particles, self.max_plate_nesting = num_particles, max_plate_nesting
        self.vectorized, self.step, self.generators = vectorized, step, generators
        self.joint = set() if joint is None else joint
        self.enum_dims = {} if enum_dims is None else enum_dims
        self.skips_unscored, self.redraws_misfits = False, False  # in trial runs

    def runs(
        self, args: tuple, kwargs: Mapping[str, Any], proposal: Callable | None = None, **options: Any
    ) -> list[list[Run]]:
        """For each group of vectorized particles, its paths through enumerated values.

        A ``proposal`` makes the draws in place of the guide.
        """
        subsamples: dict[str, Tensor] = {}
        groups: list[list[Run]] = []
        for _ in range(1 if self.vectorized else self.num_particles):
            drawn = None if proposal is None else self._proposed(proposal, args, kwargs, subsamples)
            if self.vectorized:
                groups.append([self.run(args, kwargs, subsamples=subsamples, fixed=drawn, **options)])
            else:
                groups.append(list(self.paths(args, kwargs, subsamples, fixed=drawn, **options)))
            if drawn is not None:
                _check_proposed(drawn, groups[-1][0])
        return groups

    def _proposed(
        self, proposal: Callable, args: tuple, kwargs: Mapping[str, Any], subsamples: dict[str, Tensor]
    ) -> dict[str, Draw]:
        """The draws of another program than the guide, without gradients, by site."""
        other = copy.copy(self)
        other.guide, other.resolve = proposal, lambda msg: Detached()
        with torch.no_grad():
            run = other.run(args, kwargs, subsamples=subsamples, with_model=False)
        return {site.name: Draw(site.value.detach()) for site in run.guide if site.random}

    def paths(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        subsamples: dict[str, Tensor],
        fixed: Mapping[str, Draw] | None = None,
        noise: OwnNoise | None = None,
        **options: Any,
    ) -> Iterator[Run]:
        """One particle, once for each combination of enumerated values; draws upstream of a choice are shared."""
        noise = noise or self._noise()
        waiting: list[tuple[dict[str, int], dict[str, Draw]]] = [({}, dict(fixed or {}))]
        done, covered, limit = 0, 0.0, 0
        counts: dict[str, int] = {}
        while waiting:
            choices, fixed = waiting.pop()
            run = self.run(
                args,
                kwargs,
                fixed=fixed,
                choices=dict(choices),
                subsamples=subsamples,
                noise=noise,
                fork=lambda *pending: waiting.append(pending),
                **options,
            )
            yield run
            # A path enumerates the new choices; earlier ones are given.
            counts, limit = counts | run.listed, max(limit, run.limit)
            done, covered = done + 1, covered + 1 / math.prod(counts[name] for name in run.choices)
            foreseen = round(done / covered) if done >= ENOUGH_PATHS else done + len(waiting)
            if waiting and foreseen > limit:
                raise too_many(counts, foreseen, limit)

    def run(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        fixed: Mapping[str, Draw] | None = None,
        choices: dict[str, int] | None = None,
        subsamples: dict[str, Tensor] | None = None,
        fork: Callable | None = None,
        with_model: bool = True,
        stand_in: StandIn | None = None,
        around_guide: AbstractContextManager | None = None,
        noise: OwnNoise | None = None,
        values: Mapping[str, Tensor] | None = None,
        statements: Mapping[str, Any] | None = None,
    ) -> Run:
        """Run the guide, then the model with its draws.

        ``stand_in`` may replace an estimator; ``around_guide`` is entered while the guide runs and its draws are
        scored; ``noise`` is that of an earlier run, to repeat; ``values`` are for sites that the model would otherwise
        draw instead of summing out. ``statements`` are those of an earlier run of the guide, to repeat without its
        body.
        """
        choices = {} if choices is None else choices
        subsamples = {} if subsamples is None else subsamples
        noise = noise or self._noise()
        self.memory = Memory(self.memory_limit)
        aside = noise.aside if noise else nullcontext
        chains = self._terms() if self.lists_chains else None
        draws = Draws(self, fixed or {}, choices, fork, stand_in, aside, chains and chains.listing)
        sizes: dict[str, int] = {}
        with noise.entered() if noise else nullcontext():
            with around_guide or nullcontext():
                guide = (
                    self._repeat(statements, draws)
                    if statements
                    else self._record(
                        self.guide,
                        args,
                        kwargs,
                        draws,
                        SharedSubsamples(subsamples, sizes, aside),
                        lambda: chain(draws.listed, chains.listing.listed if chains else ()),
                    )
                )
                self._check_nesting(guide)
                if chains is not None and not chains.listing.listed:
                    chains = None
                guide_sites = self._sites(guide, draws, chains) if self.max_plate_nesting is not None else []
            model, replay = Recorder(), Replay(draws, values, partial(self._terms, draws, chains))
            if chains is not None:
                replay.terms = self._terms(draws, chains)
            if with_model:
                model = self._record(
                    self.model,
                    args,
                    kwargs,
                    replay,
                    SharedSubsamples(subsamples, sizes, aside),
                    lambda: chain(draws.listed, *(each.listing.listed for each in (chains, replay.terms) if each)),
                )
            self._check_nesting(model)
            if self.max_plate_nesting is None:
                self.max_plate_nesting = max(nesting(guide), nesting(model))
                guide_sites = self._sites(guide, draws, None)
            if with_model:
                for name, msg in guide.messages.items():
                    if not site_is_subsample(msg):
                        check_observed(name, msg, model.messages.get(name))
                        if not msg["is_observed"]:
                            _check_met(name, msg, model.messages.get(name), self.max_plate_nesting)
                _check_order(guide.messages, model.messages)
            terms = replay.terms
            model_sites = self._model_sites(model, terms, set(replay.eliminated), chains)
        run = Run(guide_sites, model_sites, choices, subsamples, guide.params, model.params, noise=noise)
        run.terms = [each for each in (chains, terms) if each is not None]
        run.statements, run.model_statements = guide.messages, model.messages
        run.listed, run.limit = {name: count for name, (count, _) in draws.listed.items()}, draws.limit
        run.eliminated = (*replay.eliminated, *(terms.listing.listed if terms is not None else ()))
        return run

    def _repeat(self, statements: Mapping[str, Any], draws: Draws) -> Recorder:
        """The guide's statements again: latent sites are set or drawn, subsampled rows stay."""
        recorder = Recorder()
        for name, recorded in statements.items():
            msg = recorded.copy()
            if not site_is_subsample(msg):
                msg["value"], msg["done"] = None, False
                draws._pyro_sample(msg)
            recorder.messages[name] = msg
        return recorder

    def _noise(self) -> OwnNoise | None:
        return None if self.generators is None else OwnNoise(self.generators)

    def _check_nesting(self, recorder: Recorder) -> None:
        deepest = nesting(recorder)
        if self.max_plate_nesting is not None and deepest > self.max_plate_nesting:
            raise BadInput(f"max_plate_nesting is {self.max_plate_nesting}, but the plates nest {deepest} deep")

    def _sites(self, recorder: Recorder, draws: Draws, chains: Terms | None) -> list[Site]:
        messages = [msg for msg in recorder.messages.values() if not site_is_subsample(msg)]
        return [self._site(msg, draws, chains, place) for place, msg in enumerate(messages)]

    def _terms(self, draws: Draws | None = None, chains: Terms | None = None) -> Terms | None:
        """Enumerated values are left of all else: particles, other values of the guide, alternative draws."""
        if not self.eliminates or self.max_plate_nesting is None:
            return None
        nesting, first = self.max_plate_nesting, -3 - self.max_plate_nesting - len(self.enum_dims)
        drawn = None if draws is None else draws.draws.keys()
        if chains is not None:
            first = chains.listing.first
        before = chains and chains.listing
        listing = Listing(first, self.joint, nesting, self.memory, drawn, before, self.shares_dims)
        return Terms(listing, 1 + nesting, Symbols(first) if chains is None else chains.symbols)

    def _model_sites(
        self, recorder: Recorder, terms: Terms | None, eliminated: set[str], chains: Terms | None
    ) -> list[Site]:
        messages = [msg for msg in recorder.messages.values() if not site_is_subsample(msg)]
        if terms is None or not (terms.listing.listed or chains):
            sites = [self._site(msg, None) for msg in messages]
            for site in sites:
                if site.name in eliminated:  # drawn, for comparison with the sum
                    site.score = self._lay_out(site.name, score_log_prob(site.fn, site.value), site.frames)
            return sites
        sites = [self._site(msg, None, terms, place) for place, msg in enumerate(messages)]
        costs = terms.summed() if chains is None else expected(terms, chains, self.kl_weight)
        # From the last one on, so that earlier positions stay valid.
        for cost in sorted(costs, key=lambda found: found.place, reverse=True):
            site = terms.laid_out(cost)
            site.log_prob = self._lay_out(site.name, site.log_prob, site.frames)
            sites.insert(cost.place + 1, site)
        return sites

    def _record(
        self,
        fn: Callable,
        args,
        kwargs,
        handler: Messenger,
        subsamples: SharedSubsamples,
        listed: Callable[[], Iterable[str]],
    ) -> Recorder:
        if self.max_plate_nesting is None:
            recorder = Recorder()
        else:
            recorder = Recorder(1 + self.max_plate_nesting, self.memory, listed)
        with recorder, subsamples, handler:
            if self.vectorized and self.num_particles > 1:
                with pyro.poutine.block(hide=[PARTICLES]):
                    particles = pyro.plate(PARTICLES, self.num_particles, dim=-1 - self.max_plate_nesting)
                with particles:
                    _call(fn, args, kwargs)
            else:
                _call(fn, args, kwargs)
        return recorder

    def _site(self, msg, draws: Draws | None, terms: Terms | None = None, place: int = 0) -> Site:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        latent = not msg["is_observed"]
        frames = plates_of(msg)
        site = Site(
            name,
            fn,
            value,
            frames,
            value,
            scale=msg["scale"],
            latent=latent,
            settled=is_settled(msg),
            infer=msg["infer"],
            masked=msg["mask"] is not None,
        )
        if draws is not None and not latent and isinstance(elementary(fn), pyro.distributions.Unit):
            site.factor = not _has_rsample(msg)
        if draws is not None and latent:
            site.estimator, site.enum_dim, site.joint = draws.roles[name]
            site.draw = draws.draws[name]
            if site.estimator is not None:
                site.fn = site.estimator.guide_fn(fn, site.draw, self.step)
        try:
            given = msg["args"] or msg["kwargs"]
            unscaled = site.fn.log_prob(value, *msg["args"], **msg["kwargs"]) if given else log_prob_of(site.fn, value)
        except (KeyError, NotImplementedError) as error:
            # A transform without an inverse raises these: KeyError where its cached draw is gone.
            if not has_transforms(fn):
                raise
            if self.skips_unscored:
                site.scored, site.log_prob = False, value.new_zeros((1,) * (1 + self.max_plate_nesting))
                return site
            raise UnsupportedSite(
                name,
                site.estimator.name if site.estimator is not None else ANY,
                "its transform has no inverse, so that only a reparameterized draw can be scored, and only once",
                [] if site.estimator is not None and site.estimator.name == "pathwise" else ["pathwise"],
            ) from error
        except ValueError as error:
            first = first_line(error)
            raise BadInput(f"site {name!r}: {describe(fn)} cannot score its value ({first})") from error
        if terms is not None:
            if name in terms.listing.listed:
                # The probabilities of a masked site sum to one too.
                factor = score_log_prob(fn, value) if has_own_mask(fn) else unscaled
            else:
                factor = scale_and_mask(unscaled, 1.0, msg["mask"])
            scaled = None if draws is None else scale_and_mask(unscaled, msg["scale"], msg["mask"])
            if terms.take(site, msg, factor, place, scaled):
                return site
        scaled = scale_and_mask(unscaled, msg["scale"], msg["mask"])
        site.log_prob = self._lay_out(name, scaled, frames)
        if isinstance(site.scale, Tensor) and site.scale.requires_grad:
            site.unscaled = self._lay_out(name, scale_and_mask(unscaled, 1.0, msg["mask"]), frames)
        if site.estimator is not None and (site.estimator.log_q == "value" or site.estimator.enumerates):
            own = site.fn if site.estimator.enumerates else fn
            raw = score_log_prob(own, value) if has_own_mask(fn) or site.fn is not own else unscaled
            site.score = site.log_prob if raw is scaled else self._lay_out(name, raw, frames)
        elif site.factor:
            site.score = self._lay_out(name, unscaled, frames)
        elif site.estimator is not None and site.estimator.has_path and name not in draws.fixed and has_score_term(fn):
            raw = score_term(fn, value)
            site.score = None if raw is None else self._lay_out(name, raw, frames)
        return site

    def _lay_out(self, name: str, log_prob: Tensor, frames: Frames) -> Tensor:
        room = 1 + self.max_plate_nesting
        if log_prob.dim() < room:
            log_prob = log_prob.reshape((1,) * (room - log_prob.dim()) + log_prob.shape)
        plates = {dim for _, dim, _ in frames}
        loose = [dim for dim in range(-self.max_plate_nesting, 0) if log_prob.shape[dim] > 1 and dim not in plates]
        if not self.vectorized and log_prob.dim() >= room:
            loose += [dim for dim in range(-log_prob.dim(), -self.max_plate_nesting) if log_prob.shape[dim] > 1]
        elif log_prob.shape[-room] not in (1, self.num_particles):  # rows in the place of particles
            loose.append(-room)
        if loose:
            raise outside_plates(name, tuple(log_prob.shape), loose[0])
        return log_prob


def outside_plates(site: str, batch: tuple[int, ...], dim: int) -> UnsupportedSite:
    """The refusal of a site with a batch dimension that no plate declares."""
    return UnsupportedSite(
        site,
        ANY,
        f"its batch shape {batch} has dimension {dim} outside any plate;"
        " declare it with pyro.plate or make it part of the event with .to_event",
    )


def _call(fn: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    try:
        fn(*args, **kwargs)
    except RuntimeError as error:
        if any(
            said in str(error) for said in ("numpy() on Tensor that requires grad", "used in an in-place operation")
        ):
            raise BadInput(
                f"the program applies an operation to a draw or a parameter that torch does not allow with gradients"
                f" ({first_line(error)}); call .detach() first, or take an estimator of values alone, such as 'rloo'"
            ) from error
        if not any(said in str(error) for said in ("does not require grad", "to not have been used in the graph")):
            raise
        raise CallsAutograd(
            f"the program calls autograd inside, and something there carries no gradient ({first_line(error)}); draws"
            " have one under 'pathwise' only, parameters under every word but stl, dreg, rebar and muprop"
        ) from error
    except (ValueError, ZeroDivisionError) as error:
        # Only Pyro's own size errors are converted; errors raised by the user's program pass unchanged.
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        module = where.tb_frame.f_globals.get("__name__", "")
        if isinstance(error, GumboError) or not module.startswith(("pyro.poutine", "pyro.primitives")):
            raise
        if isinstance(error, ZeroDivisionError):
            local = where.tb_frame.f_locals
            plate = local.get("name") or getattr(local.get("self"), "name", "")
            raise BadInput(f"plate {plate!r} is empty: expected at least one row of data") from error
        raise Misfit(first_line(error)) from error


def _check_proposed(drawn: Mapping[str, Draw], run: Run) -> None:
    """Refuse a proposal that draws other sites than the guide, or sites of another shape."""
    sites = {site.name: site for site in run.guide if site.random}
    for name in sorted({*sites} ^ {*drawn}):
        who = ("guide", "proposal") if name in sites else ("proposal", "guide")
        raise UnsupportedSite(name, ANY, f"the {who[0]} draws it and the {who[1]} does not; both must draw the same")
    for name, site in sites.items():
        shape = tuple(drawn[name].value.shape)
        wanted = tuple(site.fn.batch_shape) + tuple(site.fn.event_shape)
        if shape != wanted:
            raise UnsupportedSite(name, ANY, f"the proposal's draw has shape {shape} where the guide's has {wanted}")


def check_observed(name: str, msg: Any, met: Any) -> None:
    """Refuse a site that model and guide both observe: log q would take the data's term away from log p."""
    if met is not None and msg["is_observed"] and met["is_observed"] and not (is_settled(msg) or is_settled(met)):
        reason = (
            "model and guide both observe it, so that its log-probability cancels and the value is no bound; drop it"
            " from the guide, or hide it there: pyro.poutine.block(guide, hide=['" + name + "'])"
        )
        raise UnsupportedSite(name, ANY, reason)


def _check_order(guide: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse a model in the place of the guide: its data would count against the bound."""
    seen, ours = (
        [
            name
            for name, msg in messages.items()
            if msg["is_observed"] and not (site_is_subsample(msg) or is_settled(msg))
        ]
        for messages in (guide, model)
    )
    seen = [name for name in seen if not isinstance(elementary(guide[name]["fn"]), pyro.distributions.Unit)]
    if seen and not ours:
        raise BadInput(
            f"the guide observes site {seen[0]!r} and the model observes none: pass the model first, then the guide"
        )


def _check_met(name: str, msg: Any, met: Any, max_plate_nesting: int) -> None:
    """Refuse a latent site of the guide that is no latent of the model with the same shape."""
    if met is None:
        if msg["infer"].get("is_auxiliary"):
            return
        reason = (
            "it is sampled in the guide and nowhere in the model; if that is meant, mark it"
            " infer={'is_auxiliary': True}"
        )
        raise UnsupportedSite(name, ANY, reason)
    if met["is_observed"]:
        reason = (
            "the guide samples it, and the model observes it (obs=, condition or deterministic), so that the guide's"
            " draw is not used and the value is no bound; drop it from the guide, or leave it latent in the model"
        )
        raise UnsupportedSite(name, ANY, reason)
    if is_settled(met) and not is_settled(msg):
        reason = (
            f"the model gives it one value ({describe(met['fn'])}) and the guide draws it, so that the bound is −∞; use"
            " pyro.deterministic in the model, or a Delta in the guide too"
        )
        raise UnsupportedSite(name, ANY, reason)
    (batch, event), (model_batch, model_event) = (_shape(each["fn"], max_plate_nesting) for each in (msg, met))
    if (batch, event) != (model_batch, model_event):
        kept = {frame.dim for frame in met["cond_indep_stack"]}
        lacking = [f.name for f in msg["cond_indep_stack"] if f.vectorized and f.size > 1 and f.dim not in kept]
        reason = (
            f"model and guide disagree on its shape: batch {model_batch} and event {model_event} in the model, batch"
            f" {batch} and event {event} in the guide"
        )
        if lacking:
            reason += f", in plate {lacking[0]!r}, which the model's is not in"
        raise UnsupportedSite(name, ANY, reason)


def _shape(fn: Any, max_plate_nesting: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch shape along plates, and event shape; particles and enumerated values are further left."""
    batch = tuple(fn.batch_shape)[-max_plate_nesting:] if max_plate_nesting else ()
    while batch and batch[0] == 1:
        batch = batch[1:]
    return batch, tuple(fn.event_shape)


def _has_rsample(factor: Any) -> bool:
    """Whether a ``pyro.factor`` of the guide represents reparameterized draws."""
    unit = elementary(factor["fn"])
    if "has_rsample" not in vars(unit):
        raise BadInput(
            f"pyro.factor({factor['name']!r}, …) in the guide must say where its term comes from: has_rsample=True for"
            " reparameterized draws, has_rsample=False for others"
        )
    return bool(unit.has_rsample)


def is_settled(msg) -> bool:
    return is_deterministic(msg["fn"]) or bool(msg["infer"].get("_deterministic"))


def element_support(fn: Any) -> Any:
    """The support that each element of a distribution's value must be in; None if it is not known."""
    try:
        support = fn.support
        while isinstance(support, torch.distributions.constraints.independent):
            support = support.base_constraint
        return support
    except (NotImplementedError, AttributeError, ValueError):  # how Pyro and torch report a missing support
        return None


def observed_support(msg) -> Any:
    """The support that each element of an observed value must be in; None if there is no value or no known support."""
    if not msg["is_observed"] or site_is_subsample(msg) or msg["value"] is None:
        return None
    return element_support(msg["fn"])


def in_support(support: Any, value: Any) -> Tensor | None:
    """Where values are in a support; None if it has no check."""
    try:
        return torch.as_tensor(support.check(value))
    except (NotImplementedError, AttributeError, ValueError):  # a support without a check
        return None


def check_same_kind(run: Run) -> None:
    """Refuse a comparison of a probability mass function with a density."""
    model = {site.name: site for site in run.model}
    for site in run.guide:
        other = model.get(site.name)
        if not site.latent or other is None or site.settled or other.settled:
            continue
        kinds = {is_discrete(site.fn): "a pmf", is_discrete(other.fn): "a density"}
        if len(kinds) == 2:
            guide_is, model_is = ("a pmf", "a density") if is_discrete(site.fn) else ("a density", "a pmf")
            raise UnsupportedSite(
                site.name,
                ANY,
                f"the guide has {guide_is} ({describe(site.fn)}) where the model has {model_is}"
                f" ({describe(other.fn)}), and their ratio means nothing",
            )

"""The estimator of each latent site of a guide."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ...errors import ANY, DEFAULT, BadInput, GumboError, GumboWarning, TooFewParticles, UnsupportedSite
from ...registry import name_and_options
from ..estimators import Enumerate, Estimator, MovingAverage, ScoreFunction, estimators
from ..estimators._base import Draw, choosers, detached_draw
from ..estimators._distributions import (
    describe,
    elementary,
    has_score_term,
    is_deterministic,
    is_discrete,
    learnt_parts,
    why_other_draws,
)
from .handlers import check_law
from .records import Run

TRIES = 32  # runs in which a named site is looked for
FIRST = ("pathwise", "rloo", "enumerate", "disarm", "score", "gumbel-softmax")  # of the estimators that errors advise


class Target(Protocol):
    """The interface of an objective; :class:`~gumbo.inference.objectives.Objective` implements it."""

    takes_estimators: bool
    weighs_rows: bool
    min_particles: int
    reports: tuple[str, ...]
    proposal: Callable | None

    def accepts(self, estimator: Estimator) -> bool: ...

    def refusal(self, estimator: Estimator) -> Any: ...


class Words(Protocol):
    """The words of a loss: estimators for some sites by name, and one for all others."""

    given: dict[str, Estimator]
    otherwise: Estimator | None
    objective: str
    target: Target
    plates: str
    requested_particles: int | None


def as_estimator(word: str | Estimator) -> Estimator:
    """The estimator of a word, possibly with options in a call, or the estimator itself.

    >>> as_estimator("rloo"), as_estimator("arms(draws=3)")
    (ScoreFunction(baseline=LeaveOneOut()), ARMS(draws=3))
    """
    if isinstance(word, Estimator):
        return word
    if isinstance(word, type) and issubclass(word, Estimator):
        return word()
    if not isinstance(word, str):
        raise BadInput(f"an estimator is a word or an Estimator, got {word!r}")
    name, options = name_and_options("estimator", word)
    make = choosers[name] if name in choosers else estimators[name]
    if options:
        try:
            inspect.signature(make).bind(**options)
        except TypeError as error:
            takes = ", ".join(inspect.signature(make).parameters)
            raise BadInput(f"estimator {word!r}: {error}; it takes {f'{name}({takes})' if takes else 'none'}") from None
    found = make(**options)
    if not isinstance(found, Estimator):
        raise BadInput(f"{word!r} names {found!r}, which is not an Estimator")
    return found


class _Default(Estimator):
    """Represents `pathwise if there is an rsample`, so that the error can give advice."""

    name = DEFAULT  # type: ignore[assignment]

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        if is_discrete(site["fn"]):
            return "it is discrete, with no reparameterized sampler"
        return f"{describe(site['fn'])} has no reparameterized sampler"


class Detached(Estimator):
    """Draws without gradients, for objectives that need none through their draws."""

    log_q = "value"

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)


def check_particles(
    site: str, estimator: Estimator, num_particles: int | None, alternatives: Callable[[], list[str]] = list
) -> None:
    """Raise TooFewParticles; ``alternatives`` are the words that support the site, where the site is known."""
    if num_particles is not None and num_particles < estimator.min_particles:
        raise TooFewParticles(
            site,
            estimator.name,
            f"it needs num_particles ≥ {estimator.min_particles}, got {num_particles}; leave num_particles out for the"
            " least that the words need",
            [word for word in alternatives() if estimators[word]().min_particles <= num_particles],
        )


class Resolution:
    """The estimators of a guide's sites, from the words of the loss and the sites' own.

    Attributes:
        joint: the enumerated sites whose values are enumerated jointly over their plates.
    """

    def __init__(self, words: Words):
        self.words = words
        self.known: dict[tuple[str, type, bool], Estimator] = {}
        self._checked: set[tuple[tuple[str, type, bool], tuple[str, ...]]] = set()
        self.joint: set[str] = set()

    def __call__(self, msg: Mapping[str, Any]) -> Estimator:
        """The estimator of a site, checked for each family of its distributions and each set of learnt parts."""
        # Not by the type of a wrapper: a Normal and a Bernoulli under to_event have one.
        key = (msg["name"], type(elementary(msg["fn"])), getattr(msg["fn"], "has_rsample", False))
        # A bound that was frozen in an earlier call and is learnt in this one moves the support.
        case = (key, learnt_parts(msg["fn"]))
        if case not in self._checked:
            self.known.setdefault(key, self._choose(msg))
            self._checked.add(case)
        return self.known[key]

    def of_all(self, seen: Run, again: Callable[[], Run] | None = None) -> dict[str, Estimator]:
        """The estimators of all sites in a run of the guide, by name; a site's own is recorded in the run.

        A word for a site that the run does not have, such as that of a branch, is looked for in further runs: ``again``
        makes one.

        Raises UnsupportedSite if an estimator does not support its site, or sites cannot be combined.
        """
        latent = [site for site in seen.guide if site.latent]
        names = {site.name for site in latent}
        for name, given in self.words.given.items():
            if name in seen.eliminated:
                if not given.enumerates:
                    raise UnsupportedSite(
                        name, given.name, "the model sums over it, so that nothing is drawn; draw it in the guide"
                    )
            elif name not in names and not (again and _shows(name, again)):
                known = ", ".join(sorted(names)) or "none"
                raise BadInput(
                    f"the estimators name a site {name!r} that the guide does not sample (its sites: {known})"
                )
        chosen = {}
        for site in latent:
            if not is_deterministic(site.fn):
                message = {"name": site.name, "fn": site.fn, "infer": site.infer}
                site.estimator = chosen[site.name] = self(message)
        if any(estimator.together for estimator in chosen.values()):
            for site in seen.guide:
                if site.factor:
                    word = next(estimator.name for estimator in chosen.values() if estimator.together)
                    reason = "a factor with has_rsample=False is a score term, which has no path"
                    raise UnsupportedSite(site.name, word, reason, ["pathwise"])
        for name, estimator in chosen.items():
            if any(other.together for other in chosen.values()) and not estimator.together:
                word = next(other.name for other in chosen.values() if other.together)
                raise UnsupportedSite(name, estimator.name, f"where one site takes {word!r}, every site must", [word])
        return chosen

    def as_drawn(self, msg: Mapping[str, Any]) -> Estimator | None:
        """The estimator for a trial run: draws without a path are made so, since a simulator may need that."""
        try:
            return Detached() if self(msg).log_q == "value" else None
        except GumboError:  # raised later, when all sites are known
            return None

    def _choose(self, msg: Mapping[str, Any]) -> Estimator:
        elbo, name, fn = self.words, msg["name"], msg["fn"]
        infer = msg["infer"]
        check_law(name, fn)
        if not elbo.target.takes_estimators:
            if elbo.target.proposal is None and (reason := why_other_draws(fn)) is not None:
                raise UnsupportedSite(name, ANY, reason)
            return Detached()
        if name in elbo.given:
            estimator = elbo.given[name]
        elif infer.get("estimator") is not None:
            estimator = as_estimator(infer["estimator"])
        elif infer.get("enumerate"):
            estimator = Enumerate()
        elif infer.get("baseline"):
            estimator = _honoured_baseline(name, infer["baseline"])
        elif elbo.otherwise is not None:
            estimator = elbo.otherwise
        elif getattr(fn, "has_rsample", False):
            estimator = estimators["pathwise"]()
        elif infer.get("default_estimator") is not None:
            estimator = as_estimator(infer["default_estimator"])
        else:
            estimator = _Default()
        refusal = estimator.refusal({"name": name, "fn": fn, "infer": infer, "is_observed": False})
        if refusal is not None and isinstance(estimator, _Default) and (others := self.alternatives(msg)):
            one = "rloo" if "rloo" in others else others[0]
            advice = f"choose an estimator, e.g. {one!r} (--estimator {one}; `gumbo list estimators` shows all)"
            raise UnsupportedSite(name, DEFAULT, f"{refusal.reason}; {advice}", others)
        if refusal is None or isinstance(estimator, _Default):
            refusal = elbo.target.refusal(estimator) or refusal
        if refusal is not None:
            raise refusal.about(name, estimator.name, self.alternatives(msg)).error()
        check_particles(name, estimator, elbo.requested_particles, lambda: self.alternatives(msg))
        if estimator.enumerates and elbo.plates == "ignore":
            self.joint.add(name)
        return estimator

    def alternatives(self, msg: Mapping[str, Any]) -> list[str]:
        made = {word: make() for word, make in estimators.items()}
        return _ordered([word for word, one in made.items() if self.words.target.accepts(one) and one.supports(msg)])


def warn_of_scores_of_no_draw(seen: Run, chosen: Mapping[str, Estimator]) -> None:
    """Warn of a factor that is declared as the score of draws without a path, in a guide whose draws all have one."""
    latent = [site for site in seen.guide if site.latent]
    # A Delta may hold a draw from outside of pyro.sample, and a guide without sites may hide its draws.
    if not latent or not all(
        site.name in chosen and chosen[site.name].has_path and not has_score_term(site.fn) for site in latent
    ):
        return
    for site in seen.guide:
        if site.factor and site.log_prob.requires_grad:
            warnings.warn(
                f"pyro.factor({site.name!r}, …, has_rsample=False) in the guide: its gradient is a score, multiplied by"
                " the cost, but every draw of the guide has a path; if it is a term of the loss, such as a"
                " classification loss, pass has_rsample=True",
                GumboWarning,
                stacklevel=2,
            )


def _ordered(words: list[str]) -> list[str]:
    """The words, those that suit most programs first."""
    return sorted(words, key=lambda word: FIRST.index(word) if word in FIRST else len(FIRST))


def _shows(name: str, again: Callable[[], Run]) -> bool:
    """Whether a site exists in one of some runs."""
    return any(site.name == name and site.latent for _ in range(TRIES) for site in again().guide)


def _honoured_baseline(name: str, options: Mapping[str, Any]) -> Estimator:
    """The estimator that TraceGraph_ELBO's own ``infer`` entries ask for."""
    unknown = {key for key, value in options.items() if value is not None} - {
        "use_decaying_avg_baseline",
        "baseline_beta",
    }
    if unknown:
        raise UnsupportedSite(
            name,
            "score",
            f"its infer={{'baseline': …}} asks for {sorted(unknown)[0]!r}; write it as"
            " ScoreFunction(baseline=…) for this site",
        )
    if not options.get("use_decaying_avg_baseline"):
        return ScoreFunction()
    return ScoreFunction(baseline=MovingAverage(decay=options.get("baseline_beta", 0.9)))

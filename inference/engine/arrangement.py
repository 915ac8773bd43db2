"""How the programs of a pair run: what runs at once, in which dimensions, and what is enumerated jointly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from ...errors import ANY, BadInput, CallsAutograd, CannotVectorize, GumboError, GumboWarning, UnsupportedSite
from ..estimators import Estimator
from ..estimators._base import at_step
from .elimination import NeedsListing, TooMuchMemory
from .handlers import in_chain
from .programs import Program
from .records import Run
from .resolution import Resolution, Words
from .streams import Generators
from .terms import NeedsJoint
from .vectorizing import check_at_once, check_listed, differs_listed

ONE_BY_ONE = "are run one by one"


class Loss(Words, Protocol):
    """The interface of a loss that a binding needs; :class:`SiteELBO` implements it."""

    requested_nesting: int | None
    requested_vectorized: bool | None
    vectorize_particles: bool
    undecided: bool
    decided: Callable[..., Any]
    kl_weight: float | Callable[[int], float]
    max_alternatives: int
    begins_with: Mapping[str, Any] | None
    memory_limit: float


@dataclass(frozen=True)
class Pair:
    """The programs of a binding, whose parameters belong to the binding's owner.

    ``program`` runs as the guide: the guide itself, or a program that wraps a guide which runs the model.
    """

    model: Callable
    guide: Callable
    program: Callable


class Arrangement(nn.Module):
    """How one loss runs one pair of programs. The first call decides it; a later call may revise it.

    It has no parameters. It is a module because a compiled step watches the attributes of modules.

    Attributes:
        enum_dims: the dimension of each enumerated site.
        stacks: whether many alternatives of a draw run at once.
        apart: whether particles, and enumerated values, run one by one.
        lists_chains: whether enumerated sites under pyro.markov are summed out by elimination.
        shares_dims: whether elements of a sequential plate are enumerated along the same dimensions.
        largest: the bytes of the largest statement of one particle.
    """

    def __init__(self, elbo: Loss, pair: Pair):
        super().__init__()
        self.elbo, self.pair = elbo, pair
        self.resolution = Resolution(elbo)
        self.num_particles: int | None = None
        self.max_plate_nesting: int | None = None
        self.enum_dims: dict[str, int] = {}
        self.stacks = True
        self.apart = False
        self.lists_chains = False
        self.shares_dims = True
        self.largest = 1

    @property
    def joint(self) -> set[str]:
        """The enumerated sites whose values are enumerated jointly over their plates."""
        return self.resolution.joint

    @property
    def vectorized(self) -> bool:
        """Whether leading dimensions are in use; a single particle without enumeration needs none."""
        return self.elbo.vectorize_particles and not self.apart

    def program(self, step: int, generators: Generators | None) -> Program:
        """The programs as they run at this step; with ``generators``, their own noise is kept separate."""
        return Program(
            self.pair.model,
            self.pair.program,
            resolve=self.resolution,
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting,
            vectorized=self.vectorized,
            joint=self.joint,
            enum_dims=self.enum_dims,
            step=step,
            generators=generators,
            memory_limit=self.elbo.memory_limit * 2**30,
            lists_chains=self.lists_chains and self.vectorized,
            shares_dims=self.shares_dims,
            largest=self.largest,
            kl_weight=at_step(self.elbo.kl_weight, step),
        )

    def revise(self, found: NeedsJoint | NeedsListing) -> None:
        """Enumerate from now on as a run has found necessary."""
        if isinstance(found, NeedsListing):
            self.lists_chains = False
            return
        if found.site in self.joint:
            raise UnsupportedSite(
                found.site, "enumerate", "a later plate combines its values in a way that cannot be enumerated"
            ) from None
        self.joint.add(found.site)

    # Sums by variable elimination.

    def list_chains(
        self, program: Program, seen: Run, chosen: Mapping[str, Estimator], args: tuple, kwargs: Mapping[str, Any]
    ) -> None:
        """Decide for the sites that are enumerated under pyro.markov, or by the model: by elimination, jointly, or not.

        ``program`` has run once, one particle at a time, and ``seen`` is that run.
        """
        chains = [site.name for site in seen.guide if in_chain({"infer": site.infer}, chosen.get(site.name))]
        self.lists_chains = bool(chains) and self.vectorized
        if self.lists_chains:
            for name, estimator in chosen.items():  # dimensions of enumerated chains are to the left of these
                if estimator.enumerates and name not in chains:
                    self.enum_dims.setdefault(name, -(2 + program.max_plate_nesting + len(self.enum_dims)))
        if seen.eliminated or self.lists_chains:
            self._settle_listed(program, seen, args, kwargs, chains)

    def _settle_listed(
        self, program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any], chains: Sequence[str]
    ) -> None:
        """Determine the sites to enumerate jointly over their plates, and whether elimination serves the chains."""
        program.joint, program.memory_limit = self.joint, self.elbo.memory_limit * 2**30
        program.resolve = partial(self._as_listed, chains)
        if self.elbo.plates == "ignore":
            self.joint.update((*seen.eliminated, *(chains if self.lists_chains else ())))
        plates = {site.name: site.frames for site in seen.sites}
        while seen.eliminated or self.lists_chains:
            program.lists_chains, program.shares_dims = self.lists_chains, self.shares_dims
            try:
                difference = check_listed(program, seen, args, kwargs, chains if self.lists_chains else ())
            except (NeedsJoint, NeedsListing) as found:
                self.revise(found)
                continue
            except UnsupportedSite as error:
                if isinstance(error, TooMuchMemory):
                    raise
                if self.shares_dims and seen.loops:
                    self.shares_dims = False
                    continue
                if not self.lists_chains:
                    raise
                self.lists_chains = False
                continue
            if difference is None:
                return
            if self.shares_dims and seen.loops:
                self.shares_dims = False
                continue
            site, reason, names = difference
            apart = [name for name in names if plates[name] and name not in self.joint]
            if apart and self.elbo.plates != "trust":
                self.joint.update(apart)
            elif self.lists_chains:
                self.lists_chains = False
            else:
                raise differs_listed(site, reason, names)

    def _as_listed(self, chains: Collection[str], msg: Mapping[str, Any]) -> Estimator | None:
        return self.resolution(msg) if msg["name"] in chains else self.resolution.as_drawn(msg)

    # What runs at once.

    def settle(
        self,
        program: Callable[[], Program],
        seen: Run,
        chosen: Mapping[str, Estimator],
        args: tuple,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Determine what runs at once: particles and alternatives, enumerated values only, or nothing."""
        reruns = any(estimator.reruns for estimator in chosen.values())
        try:
            # Two particles test alternatives, which run in another leading dimension.
            self._check(program, seen, args, kwargs, max(self.num_particles, 2) if reruns else self.num_particles)
            return
        except GumboError as error:
            if not _of_the_dimensions(error):
                raise
            first = error
        if self.num_particles == 1 and reruns:
            self.stacks = False
            if not any(estimator.enumerates for estimator in chosen.values()):
                return
            self.enum_dims.clear()
            try:
                self._check(program, seen, args, kwargs, 1)
                return
            except GumboError as error:
                if not _of_the_dimensions(error):
                    raise
        if self.elbo.requested_vectorized:
            raise first
        self.enum_dims.clear()
        self.apart = True
        what = "particles" if self.num_particles > 1 else "enumerated values"
        why = str(first).split("; pass vectorize_particles")[0]
        warnings.warn(
            f"{why}; {what} {ONE_BY_ONE} (vectorize_particles=False does so without this warning)",
            GumboWarning,
            stacklevel=2,
        )

    def _check(
        self, make: Callable[[], Program], seen: Run, args: tuple, kwargs: Mapping[str, Any], num_particles: int
    ) -> None:
        while True:
            program = make()
            program.num_particles = num_particles
            try:
                check_at_once(program, seen, args, kwargs)
                return
            except (NeedsJoint, NeedsListing) as found:
                self.revise(found)


def _of_the_dimensions(error: GumboError) -> bool:
    """Whether a run with leading dimensions failed because of these, judged by its error."""
    if isinstance(error, CannotVectorize):
        return True
    if isinstance(error, UnsupportedSite):
        return error.estimator == ANY and not isinstance(error, TooMuchMemory)
    return isinstance(error, BadInput) and not isinstance(error, CallsAutograd)

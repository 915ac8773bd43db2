"""Inversion of a prior's graph to a graph of the posterior: moralization, then elimination site by site."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..errors import BadInput


@dataclass(frozen=True)
class Inverse:
    """A factorization of a posterior, in drawing order.

    Attributes:
        parents: for each latent site the latent sites that its factor depends on, all drawn before it.
        observed: for each latent site the observed sites that its factor depends on.
        coupled: for each latent site the plates along which its own elements depend on each other.
    """

    parents: dict[str, tuple[str, ...]]
    observed: dict[str, tuple[str, ...]]
    coupled: dict[str, frozenset[str]]


def faithful_inverse(
    prior: Mapping[str, Collection[str]],
    observed: Collection[str] = (),
    *,
    plates: Mapping[str, Collection[str]] | None = None,
    summed: Collection[str] = (),
    order: Sequence[str] | None = None,
) -> Inverse:
    """A graph of the posterior that implies no independence beyond those of the prior's graph.

    The prior's graph is moralized, observed sites included, and latent sites are eliminated one by one: a site's
    parents are its remaining neighbours, and these are then connected to each other. The site that is eliminated
    first is drawn last. Sites of deeper plates are eliminated first, so that each factor can be drawn row by row;
    among the others, the one that couples the fewest rows of plates with data (the component means of a mixture are
    drawn before the assignments of the data), then the one that adds the fewest edges, and of equals the one that the
    model samples last.

    Webb et al. 2018, "Faithful inversion of generative models for effective amortized inference", arXiv:1712.00287.

    Args:
        prior: for each site, in the model's order, the latent sites on which it depends.
        observed: the sites that are observed.
        plates: the plates of each site.
        summed: latent sites that are summed out first, and are not in the result.
        order: the order in which to draw the sites, instead of the one found.

    Raises:
        BadInput: an ``order`` that does not name each latent site once.

    >>> faithful_inverse({"a": [], "b": ["a"], "y": ["b"]}, ["y"]).parents
    {'a': (), 'b': ('a',)}
    >>> prior = {"mu": [], "t1": ["mu"], "t2": ["mu"], "y": ["t1", "t2"]}
    >>> faithful_inverse(prior, ["y"], order=["t1", "t2", "mu"]).parents
    {'t1': (), 't2': ('t1',), 'mu': ('t1', 't2')}
    """
    within = {name: frozenset((plates or {}).get(name, ())) for name in prior}
    latent = [name for name in prior if name not in observed]
    drawn = [name for name in latent if name not in summed]
    if order is not None and sorted(order) != sorted(drawn):
        raise BadInput(f"order names {', '.join(order)}: expected each latent site once ({', '.join(drawn)})")
    graph = _Graph(prior, observed, within)
    waiting = [name for name in latent if name in summed]
    while waiting:
        graph.eliminate(waiting.pop(waiting.index(graph.cheapest(waiting))))
    forwards = list(order) if order is not None else []
    for name in reversed(forwards):
        graph.eliminate(name)
    while graph.near:
        graph.eliminate(name := graph.next())
        forwards.insert(0, name)
    rank = {name: place for place, name in enumerate(forwards)}
    return Inverse(
        {name: tuple(sorted(graph.parents[name], key=rank.__getitem__)) for name in forwards},
        {name: tuple(sorted(graph.reads[name], key=graph.places.__getitem__)) for name in forwards},
        {name: frozenset(graph.coupled[name]) for name in forwards},
    )


class _Graph:
    """The moralized graph of a prior, from which latent sites are eliminated one by one.

    Attributes:
        places: the place of each site in the model's order.
        near: for each latent site that is left, its neighbours.
        seen: for each latent site the observed sites that depend on it, or on a site that was eliminated near it.
        coupled: for each latent site the plates along which its own elements depend on each other.
        parents, reads: for each eliminated site its latent and its observed neighbours at that time.
    """

    def __init__(
        self, prior: Mapping[str, Collection[str]], observed: Collection[str], within: Mapping[str, frozenset[str]]
    ):
        self.within, self.places = within, {name: place for place, name in enumerate(prior)}
        self.with_data = frozenset().union(*(within[name] for name in prior if name in observed))
        latent = [name for name in prior if name not in observed]
        self.near: dict[str, set[str]] = {name: set() for name in latent}
        self.seen: dict[str, set[str]] = {name: set() for name in latent}
        self.coupled: dict[str, set[str]] = {name: set() for name in latent}
        self.parents: dict[str, set[str]] = {}
        self.reads: dict[str, set[str]] = {}
        for child, above in prior.items():
            family = [name for name in above if name in self.near]
            for name in family:
                self.coupled[name] |= within[name] - within[child]
                if child in self.near:
                    self._join(name, child)
                else:
                    self.seen[name].add(child)
            for one, other in combinations(family, 2):
                self._join(one, other)

    def _join(self, one: str, other: str) -> None:
        self.near[one].add(other)
        self.near[other].add(one)

    def eliminate(self, name: str) -> None:
        """Take a site out of the graph, and connect its neighbours to each other."""
        left = self.near.pop(name)
        self.parents[name], self.reads[name] = set(left), set(self.seen[name])
        for other in left:
            self.near[other].discard(name)
            self.seen[other] |= self.seen[name]
            self.coupled[other] |= self.within[other] - self.within[name]
        for one, other in combinations(left, 2):
            self._join(one, other)

    def next(self) -> str:
        """The site to eliminate next."""
        deepest = [name for name in self.near if not any(self.within[name] < self.within[one] for one in self.near)]
        fewest = min(map(self._couples, deepest))
        return self.cheapest([name for name in deepest if self._couples(name) == fewest])

    def _couples(self, name: str) -> int:
        """How many pairs of a site and a plate with data are coupled once this site is eliminated."""
        lost = (self.within[other] - self.within[name] - self.coupled[other] for other in self.near[name])
        return sum(len(plates & self.with_data) for plates in lost)

    def cheapest(self, names: Iterable[str]) -> str:
        """The site whose elimination adds the fewest edges; of equals the one that the model samples last."""

        def added(name: str) -> int:
            return sum(other not in self.near[one] for one, other in combinations(self.near[name], 2))

        return min(names, key=lambda name: (added(name), -self.places[name]))


def drawn_in_model_order(
    sites: Sequence[str], plates: Mapping[str, Collection[str]], parents: Mapping[str, Collection[str]]
) -> list[str]:
    """The sites ordered by number of plates, then in the model's order, each after its ``parents``."""
    waiting, drawn = sorted(sites, key=lambda name: len(set(plates[name]))), []
    while waiting:
        ready = next((name for name in waiting if all(above in drawn for above in parents.get(name, ()))), None)
        if ready is None:
            raise BadInput(f"dependencies form a cycle among {', '.join(waiting)}")
        waiting.remove(ready)
        drawn.append(ready)
    return drawn

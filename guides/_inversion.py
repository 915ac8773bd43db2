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
    places = {name: place for place, name in enumerate(prior)}
    within = {name: frozenset((plates or {}).get(name, ())) for name in prior}
    latent = [name for name in prior if name not in observed]
    drawn = [name for name in latent if name not in summed]
    if order is not None and sorted(order) != sorted(drawn):
        raise BadInput(f"order names {', '.join(order)}: expected each latent site once ({', '.join(drawn)})")
    near: dict[str, set[str]] = {name: set() for name in latent}
    seen: dict[str, set[str]] = {name: set() for name in latent}
    coupled: dict[str, set[str]] = {name: set() for name in latent}
    for child, above in prior.items():
        family = [name for name in above if name in near]
        for name in family:
            coupled[name] |= within[name] - within[child]
            if child in near:
                _join(near, name, child)
            else:
                seen[name].add(child)
        for one, other in combinations(family, 2):
            _join(near, one, other)

    parents: dict[str, set[str]] = {}
    reads: dict[str, set[str]] = {}

    def eliminate(name: str) -> None:
        left = near.pop(name)
        parents[name], reads[name] = set(left), set(seen[name])
        for other in left:
            near[other].discard(name)
            seen[other] |= seen[name]
            coupled[other] |= within[other] - within[name]
        for one, other in combinations(left, 2):
            _join(near, one, other)

    with_data = frozenset().union(*(within[name] for name in prior if name in observed))

    def couples(name: str) -> int:
        """How many pairs of a site and a plate with data are coupled once this site is eliminated."""
        return sum(len((within[other] - within[name] - coupled[other]) & with_data) for other in near[name])

    waiting = [name for name in latent if name in summed]
    while waiting:
        eliminate(waiting.pop(waiting.index(_cheapest(waiting, near, places))))
    given = list(reversed(order)) if order is not None else None
    backwards = []
    while near:
        if given is not None:
            name = given.pop(0)
        else:
            deepest = [name for name in near if not any(within[name] < within[other] for other in near)]
            fewest = min(map(couples, deepest))
            name = _cheapest([name for name in deepest if couples(name) == fewest], near, places)
        eliminate(name)
        backwards.append(name)
    forwards = list(reversed(backwards))
    rank = {name: place for place, name in enumerate(forwards)}
    return Inverse(
        {name: tuple(sorted(parents[name], key=rank.__getitem__)) for name in forwards},
        {name: tuple(sorted(reads[name], key=places.__getitem__)) for name in forwards},
        {name: frozenset(coupled[name]) for name in forwards},
    )


def _join(near: dict[str, set[str]], one: str, other: str) -> None:
    near[one].add(other)
    near[other].add(one)


def _cheapest(names: Iterable[str], near: Mapping[str, set[str]], places: Mapping[str, int]) -> str:
    def added(name: str) -> int:
        return sum(other not in near[one] for one, other in combinations(near[name], 2))

    return min(names, key=lambda name: (added(name), -places[name]))


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

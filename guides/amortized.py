"""An amortized guide for any Pyro model, built from draws of its prior."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to

from ..arrays import readable, refuse_table
from ..errors import BadInput, UnknownName
from ..models._networks import beside_each_other
from ..tables import folded, wrapped
from ._conditionals import Family, family_of
from ._encoders import WIDEST, GlobalHead, LocalHead, Own, Trunk, aligned, flattened
from ._inversion import Inverse, drawn_in_model_order, faithful_inverse
from ._structure import Covariate, Look, Plate, Seen, Structure, covariates, look_at, read, tensors_in, whole, within

DEPENDENCIES = ("mean-field", "faithful", "full")
MOST_JOINT = 100  # the most numbers of a global site with one covariance
MOST_JOINT_LOCAL = 16  # and of a local one, whose covariance a network computes
MOST_LISTED = 64  # the most joint values of discrete sites to enumerate by default
START = 5  # number of prior draws whose median initializes a global site


@dataclass(frozen=True)
class Decision:
    """The decisions of :func:`amortize` for one site, with reasons.

    Attributes:
        site: the name of the site.
        plates: the plates that it is in.
        scope: ``local``, ``global`` or ``summed out``.
        family: its distribution, in words.
        parents: the latent sites that its factor depends on.
        reads: the observed sites and arguments that its encoder reads.
        encoder: its network, in words.
        estimator: its word unless the loss names one.
        why: the reasons, in words.

    `AmortizedGuide` has an example.
    """

    site: str
    plates: tuple[str, ...]
    scope: str
    family: str
    parents: tuple[str, ...]
    reads: tuple[str, ...]
    encoder: str
    estimator: str
    why: str


class AmortizedGuide(PyroModule):
    """The guide made by :func:`amortize`; ``guide(*args)`` takes the model's arguments, and returns its draws.

    Args:
        model: the Pyro program.
        structure: its latent sites, plates and dependencies, as found in draws from the prior.
        inverse: the factorization of the posterior, in drawing order.
        args: the model's arguments.
        kwargs: the model's keywords.
        hidden: widths of the hidden layers of the encoders and of the sites' networks.
        encoder: the module that takes an encoder's place, or one for each local site; None makes them.
        dependencies: the word, or ``given``.
        found: the arguments with a row for each element of some plates.
        fixed: the plates whose size does not vary with the arguments.

    Attributes:
        decisions: the decision for each site, with reasons; ``print(guide)`` shows them as a table.
        parents: the latent sites that each site's factor depends on, in the order in which sites are drawn.
        dependencies: the word, or ``given``.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> import torch
    >>> from gumbo.guides import amortize
    >>> def model(x):
    ...     with pyro.plate("rows", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = amortize(model, torch.randn(8), quiet=True)
    >>> [(decision.site, decision.scope, decision.reads) for decision in guide.decisions]
    [('z', 'local', ('x',))]
    """

    plain_networks = True

    def __init__(
        self,
        model: Callable,
        structure: Structure,
        inverse: Inverse,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        hidden: Sequence[int],
        encoder: nn.Module | Mapping[str, nn.Module] | None,
        dependencies: str,
        found: Sequence[Covariate],
        fixed: Collection[str],
    ):
        super().__init__()
        self._model = (model,)  # no part of the guide: its parameters are not the guide's
        self.dependencies, self.notes = dependencies, list(structure.notes)
        look = structure.first
        self._depth = look.depth
        self._plates = dict(look.plates)
        self._conditioned = frozenset(look.observed)
        joint = dependencies != "mean-field"
        self._families: dict[str, Family] = {}
        self._scopes: dict[str, str] = {}
        self._coupled: dict[str, bool] = {}
        reasons: dict[str, list[str]] = {}
        for name in inverse.parents:
            seen, why = look.latent[name], []
            self._scopes[name] = self._scope(seen, look, inverse.coupled[name] if joint else frozenset(), why)
            most = MOST_JOINT if self._scopes[name] == "global" else MOST_JOINT_LOCAL
            family = family_of(seen, joint, most)
            rows = math.prod(look.plates[plate].size for plate in seen.plates)
            self._coupled[name] = (
                joint
                and self._scopes[name] == "global"
                and bool(inverse.coupled[name])
                and family.continuous
                and 1 < rows * family.size <= MOST_JOINT
            )
            if self._coupled[name]:
                size = rows * family.size
                family = Family(
                    family.kind.replace("Normal", "joint Normal", 1) if not family.joint else family.kind,
                    size,
                    2 * size + size * size,
                    True,
                    (size,),
                    size,
                )
                why.append(f"one covariance over plate {' and '.join(seen.plates)}, whose rows the data couple")
            elif joint and inverse.coupled[name]:
                why.append(f"rows of plate {' and '.join(sorted(inverse.coupled[name]))} are coupled, and drawn apart")
            if family.continuous and joint and not family.joint and family.size > 1:
                why.append(f"{family.size} numbers, more than the {most} that share a covariance")
            self._families[name], reasons[name] = family, why
        self._elements = {name: family_of(look.latent[name], False, 0) for name in inverse.parents}
        self.parents = self._kept_parents(inverse, look, reasons)
        self._build(structure, inverse, args, kwargs, hidden, encoder, found, fixed, reasons)

    @staticmethod
    def _scope(seen: Seen, look: Look, coupled: Collection[str], why: list[str]) -> str:
        with_data = [
            plate for plate in seen.plates if any(plate in o.plates and not o.is_factor for o in look.observed.values())
        ]
        if not seen.plates:
            why.append("outside of any plate")
            return "global"
        if not with_data:
            why.append(f"plate {' and '.join(seen.plates)} holds no data")
            return "global"
        rows = math.prod(look.plates[plate].size for plate in seen.plates)
        subsampled = any(look.plates[plate].subsampled for plate in seen.plates)
        if coupled and not subsampled and rows * math.prod(seen.event_shape) <= MOST_JOINT:
            why.append(f"the data couple the rows of plate {' and '.join(sorted(coupled))}")
            return "global"
        why.append(f"plate {' and '.join(with_data)} holds data{' (subsampled)' if subsampled else ''}")
        return "local"

    def _kept_parents(self, inverse: Inverse, look: Look, reasons: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
        """The parents that a network can take: rows of another plate are concatenated if their number is fixed."""
        kept: dict[str, tuple[str, ...]] = {}
        for name, above in inverse.parents.items():
            mine = self._apart(name, look)
            fine = []
            for other in above:
                beyond = [look.plates[plate] for plate in look.latent[other].plates if plate not in mine]
                size = self._elements[other].features * math.prod(plate.size for plate in beyond)
                if any(plate.subsampled for plate in beyond) or size > WIDEST:
                    reasons[name].append(
                        f"{other} left out ({size} numbers over plate {beyond[0].name})"
                        if beyond
                        else f"{other} left out ({size} numbers)"
                    )
                else:
                    fine.append(other)
            kept[name] = tuple(fine)
        return kept

    def _build(self, structure, inverse, args, kwargs, hidden, encoder, found, fixed, reasons) -> None:
        look = structure.first
        given = {path: covariate.of(args, kwargs) for path, covariate in ((c.path, c) for c in found)}
        self._trunk_of: dict[str, str] = {}
        self._heads: dict[str, str] = {}
        self.encoder_trunks, self.encoder_sites = nn.ModuleDict(), nn.ModuleDict()
        for place, name in enumerate(inverse.parents):
            seen, family = look.latent[name], self._families[name]
            parents = sum(self._width(other, name, look) for other in self.parents[name])
            key = self._heads[name] = f"site{place}_{re.sub(r'[^0-9a-zA-Z_]', '_', name)}"
            loc = self._start(structure, name)
            if self._scopes[name] == "local":
                trunk = self._trunk(seen, look, hidden, encoder, found, given, fixed)
                self._trunk_of[name] = trunk
                size = self.encoder_trunks[trunk].size
                self.encoder_sites[key] = LocalHead(family, size, parents, hidden, loc)
            else:
                shape = self._rows(name, look)
                self.encoder_sites[key] = GlobalHead(family, shape, parents, hidden, loc)
        self._estimators = self._words(look)
        self.decisions = tuple(self._decide(name, look, reasons[name]) for name in inverse.parents) + tuple(
            Decision(name, site.plates, "summed out", "", (), (), "", "enumerate", "marked so in the model")
            for name, site in look.sites.items()
            if site.summed
        )

    def _rows(self, name: str, look: Look) -> list[int]:
        """The shape of a global site's rows, with ones for dimensions without a plate."""
        shape = [1] * self._depth
        if not self._coupled[name]:
            for plate in look.latent[name].plates:
                shape[look.plates[plate].dim] = look.plates[plate].full_size
        return shape

    def _shape_of(self, plates: Sequence[str], look: Look) -> list[int]:
        """The batch shape of this run's rows of those plates, with ones for the other dimensions."""
        shape = [1] * self._depth
        for plate in plates:
            shape[look.plates[plate].dim] = look.plates[plate].size
        return shape

    def _apart(self, name: str, look: Look) -> tuple[str, ...]:
        """The plates whose rows a site's factor draws apart."""
        return () if self._coupled[name] else look.sites[name].plates

    def _width(self, name: str, below: str, look: Look) -> int:
        """How many numbers a parent is to the factor of the site ``below``."""
        apart = self._apart(below, look)
        beyond = [look.plates[plate].size for plate in look.latent[name].plates if plate not in apart]
        return self._elements[name].features * math.prod(beyond)

    def _start(self, structure: Structure, name: str) -> Tensor:
        """Where a site's unconstrained numbers start: the median of some draws from its prior."""
        element, seen = self._elements[name], structure.first.latent[name]
        if not element.continuous:
            return torch.zeros(self._families[name].size)
        draws = []
        for look in structure.looks[:START]:
            one = look.latent[name]
            value = one.value.expand(one.batch_shape + one.event_shape)
            draws.append(aligned(element.read(value, one), len(one.batch_shape), self._depth))
        median = torch.stack(draws).median(0).values
        if self._scopes[name] == "local":
            return median.reshape(-1, element.size).median(0).values
        if self._coupled[name]:
            return median.reshape((1,) * self._depth + (-1,))
        for plate in (structure.first.plates[p] for p in seen.plates):
            if plate.subsampled:
                mean = median.mean(plate.dim - 1, keepdim=True)
                median = mean.expand(
                    *(plate.full_size if d == plate.dim - 1 + median.dim() else s for d, s in enumerate(median.shape))
                )
        return median

    def _trunk(self, seen, look, hidden, encoder, found, given, fixed) -> str:
        plates = tuple(p for p in seen.plates if any(p in o.plates for o in look.observed.values() if not o.is_factor))
        own = encoder.get(seen.name) if isinstance(encoder, Mapping) else encoder
        key = "at_" + "_".join(re.sub(r"[^0-9a-zA-Z_]", "_", plate) for plate in plates)
        if own is not None and isinstance(encoder, Mapping):
            key += f"_{re.sub(r'[^0-9a-zA-Z_]', '_', seen.name)}"
        if key in self.encoder_trunks:
            return key
        observed = [
            name for name, site in look.observed.items() if set(site.plates) & set(plates) and not site.is_factor
        ]
        if own is not None:
            self.encoder_trunks[key] = Own(own, plates, observed, look)
            return key
        beside = [(c, given[c.path]) for c in found if set(c.plates) & set(plates)]
        sizes = {c.path: given[c.path].numel() / math.prod(given[c.path].shape[a] for _, a in c.axes) for c in found}
        wide = [c for c, _ in beside if sizes[c.path] > WIDEST]
        for covariate in wide:
            self.notes.append(f"{covariate.name} is not read ({sizes[covariate.path]:.0f} numbers a row): use encoder=")
        beside = [(c, value) for c, value in beside if c not in wide]
        # Rows of a crossing plate with other latent sites are not exchangeable: each is read at its position.
        crossing = {p for site in look.latent.values() if not set(site.plates) >= set(plates) for p in site.plates}
        self.encoder_trunks[key] = Trunk(plates, observed, beside, look, hidden, {*fixed, *crossing})
        return key

    def _words(self, look: Look) -> dict[str, str]:
        """An estimator for each site: discrete sites take enumerate if their joint values are few, else rloo."""
        total, words = 1, {}
        for name, family in self._families.items():
            if family.continuous:
                words[name] = "pathwise"
                continue
            seen = look.latent[name]
            rows = 1 if self._scopes[name] == "local" else math.prod(look.plates[p].size for p in seen.plates)
            listed = (
                family.values
                if family.values
                and math.prod(seen.event_shape[: len(seen.event_shape) - (family.kind == "one-hot")]) == 1
                and family.kind != "negative binomial"
                else 0
            )
            if listed and total * listed**rows <= MOST_LISTED:
                total *= listed**rows
                words[name] = "enumerate"
            else:
                words[name] = "rloo"
        return words

    def _decide(self, name: str, look: Look, why: Sequence[str]) -> Decision:
        seen, reads, what = look.latent[name], (), "parameters of its own"
        if name in self._trunk_of:
            trunk = self.encoder_trunks[self._trunk_of[name]]
            beside = [b.covariate.name for b in trunk.beside] if isinstance(trunk, Trunk) else []
            reads, what = (*trunk.observed, *beside), trunk.what
        return Decision(
            name,
            seen.plates,
            self._scopes[name],
            self._families[name].kind,
            self.parents[name],
            reads,
            what,
            self._estimators[name],
            "; ".join(why),
        )

    # ---- the program

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        look = look_at(self._model[0], args, kwargs)
        # Under Pyro's idiom each mention of these registers all their parameters again.
        trunks, sites = self.encoder_trunks, self.encoder_sites
        heads = {name: sites[key] for name, key in self._heads.items()}
        self._check(look, trunks)
        with poutine.block():
            plates = {
                plate.name: pyro.plate(plate.name, dim=plate.dim)
                if self._plates[plate.name].full_size < 0
                else pyro.plate(plate.name, plate.full_size, subsample=plate.rows, dim=plate.dim)
                for plate in look.plates.values()
            }
        features: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        unread = {key for key, trunk in trunks.items() if any(name in look.latent for name in trunk.observed)}
        for name, above in self.parents.items():
            seen = look.sites[name]
            trunk = self._trunk_of.get(name)
            missing = [other for other in above if other not in values]
            if trunk in unread or missing:
                if trunk is None:
                    raise BadInput(
                        f"amortize: site {name!r} depends on {missing[0]!r}, whose encoder reads data that are missing;"
                        " give the guide the arguments that the model is conditioned on"
                    )
                continue  # the model draws it, from its prior
            if trunk is not None and trunk not in features:
                features[trunk] = trunks[trunk](look, args, kwargs)
            parents = [self._seen_by(name, other, values[other], look, heads[other]) for other in above]
            joined = beside_each_other(parents) if parents else None
            if trunk is not None:
                output = heads[name](features[trunk], joined)
            else:
                output = heads[name](joined, self._row_index(name, look))
            values[name] = self._sample(name, output, seen, look, plates)
        return values

    def _sample(self, name: str, output: Tensor, seen: Seen, look: Look, plates: Mapping[str, Any]) -> Tensor:
        family = self._families[name]
        infer = {} if family.continuous else {"default_estimator": self._estimators[name]}
        mask = None if seen.mask is None else poutine.mask(mask=seen.mask)
        scale = None if isinstance(seen.scale, float) and seen.scale == 1.0 else poutine.scale(scale=seen.scale)
        contexts = [plates[plate] for plate in seen.plates]
        if not self._coupled[name]:
            with within(*contexts, mask, scale):
                return pyro.sample(name, family.make(_narrowed(output, seen, look), seen), infer=infer)
        with within(scale):
            flat = pyro.sample(f"{name}_joint", family.base(_flat(output)), infer={"is_auxiliary": True})
        rank, element = len(seen.event_shape), self._elements[name]
        shape = self._shape_of(seen.plates, look)
        leading = flat.shape[:-1]
        leading = leading[: len(leading) - self._depth] if len(leading) > self._depth else torch.Size()
        inner = flat.reshape(*leading, *shape, *element.shape)
        support = whole(seen.support, rank)
        transform = biject_to(support)
        value = transform(inner)
        density = -_sum_to(transform.log_abs_det_jacobian(inner, value), len(leading) + self._depth)
        extra = len(leading) + self._depth - len(seen.batch_shape) if not leading else 0
        if extra > 0:
            value, density = value.reshape(value.shape[extra:]), density.reshape(density.shape[extra:])
        with within(*contexts, mask, scale):
            return pyro.sample(name, dist.Delta(value, log_density=density, event_dim=rank))

    def _seen_by(self, below: str, name: str, value: Tensor, look: Look, head: nn.Module) -> Tensor:
        """A parent's value as features for the factor of the site ``below``."""
        seen, element = look.sites[name], self._elements[name]
        rank = len(seen.event_shape)
        x = aligned(element.read(value, seen), value.dim() - rank, self._depth)
        if isinstance(head, GlobalHead) and element.continuous:
            if self._coupled[name]:
                shape = self._shape_of(seen.plates, look)
                x = x.expand(*x.shape[: x.dim() - 1 - self._depth], *shape, x.shape[-1])
                flat = x.reshape(*x.shape[: x.dim() - 1 - self._depth], *[1] * self._depth, -1)
                x = head.centred(flat).reshape(x.shape)
            elif not any(look.plates[plate].subsampled for plate in seen.plates):
                x = head.centred(x)
        apart = self._apart(below, look)
        beyond = [look.plates[plate] for plate in seen.plates if plate not in apart]
        if beyond:
            shape = list(x.shape)
            for plate in beyond:
                shape[plate.dim - 1] = plate.size
            x = flattened(x.expand(shape), [plate.dim for plate in beyond])
        return x

    def _row_index(self, name: str, look: Look) -> dict[int, Tensor]:
        plates = [look.plates[plate] for plate in look.sites[name].plates]
        return {plate.dim: plate.rows for plate in plates if plate.subsampled and plate.rows is not None}

    def _check(self, look: Look, trunks: nn.ModuleDict) -> None:
        for name in look.latent:
            if name not in self.parents:
                if name in self._conditioned:
                    continue  # without a value, as for predictions
                raise BadInput(
                    f"amortize: site {name!r} is latent on these arguments, and was not there when the guide was built;"
                    " give the guide the arguments that the model is conditioned on"
                )
        for name in self.parents:
            if name not in look.sites or look.sites[name].observed:
                what = "observed" if name in look.sites else "missing"
                raise BadInput(f"amortize: latent site {name!r} is {what} on these arguments; build a guide for them")
        for trunk in trunks.values():
            for name in trunk.observed:
                if name not in look.sites:
                    raise BadInput(
                        f"amortize: site {name!r} is not observed on these arguments, and an encoder reads it"
                    )

    # ---- what it says

    def table(self) -> str:
        """The decisions as lines of text, and what was found out in another way than by tracking values."""
        heads = ("site", "plates", "scope", "family", "depends on", "reads", "encoder", "estimator")
        body, reasons = [], {}
        for d in self.decisions:
            parts = (d.site, d.plates, d.scope, d.family, d.parents, d.reads, d.encoder, d.estimator)
            body.append([", ".join(part) or "–" if isinstance(part, tuple) else part or "–" for part in parts])
            reasons.setdefault(d.why, []).append(d.site)
        said = [f"{', '.join(sites)}: {why}" for why, sites in reasons.items()]
        said += [f"note: {note}" for note in self.notes]
        table = folded(heads, body, left=len(heads))
        return "\n".join([f"dependencies: {self.dependencies}", *table, *map(wrapped, said)])

    def __str__(self) -> str:
        return self.table()


def _narrowed(output: Tensor, seen: Seen, look: Look) -> Tensor:
    """Numbers without the leading ones that the site's own batch shape does not have."""
    depth, mine = look.depth, len(seen.batch_shape)
    while output.dim() - 1 > mine and output.dim() - 1 <= depth and output.shape[0] == 1:
        output = output.squeeze(0)
    return output


def _flat(output: Tensor) -> Tensor:
    while output.dim() > 1 and output.shape[0] == 1:
        output = output.squeeze(0)
    return output


def _sum_to(value: Tensor, dims: int) -> Tensor:
    return value.sum(list(range(dims, value.dim()))) if value.dim() > dims else value


def amortize(
    model: Callable,
    *args: Any,
    hidden: Sequence[int] | int | None = None,
    encoder: nn.Module | Mapping[str, nn.Module] | None = None,
    dependencies: str | Mapping[str, Sequence[str]] = "faithful",
    order: Sequence[str] | None = None,
    quiet: bool = False,
    **kwargs: Any,
) -> AmortizedGuide:
    r"""An amortized guide for any Pyro model, from some twenty draws of its prior on the arguments of a call.

    Plates determine which sites are local: a latent site in a plate with observed data has an encoder, which reads the
    data of its own element; any other site has its own parameters. The support of a site determines its family: a
    transformed Normal, or a categorical, Bernoulli, Binomial or negative binomial. ``dependencies`` sets the
    factorization of the posterior:

    - ``"mean-field"``: all sites, and all numbers of a site, are independent;
    - ``"faithful"``: the graph of the prior is found by value tracking (and, where that fails, by changing one site's
      value at a time), moralized, and inverted by elimination, so that the guide implies no independence beyond those
      of the model; numbers of one site share a covariance;
    - ``"full"``: each site depends on all earlier ones;
    - a mapping from sites to the sites that they depend on.

    The table of the decisions for each site, with reasons, is printed once, and by ``print(guide)``. Random state and
    the param store are restored.

    Args:
        model: any Pyro program.
        args: the model's arguments, data included: a batch of the guide's data.
        hidden: the sizes of the encoders' layers; None takes (64, 64).
        encoder: a module that maps the observed values to features ``(*plates, F)``, or a mapping from local sites to
            such modules.
        dependencies: as above.
        order: with ``"faithful"``, the order in which to draw the latent sites, instead of the one found.
        quiet: print no table.
        kwargs: the model's keywords.

    Returns:
        The guide, a :class:`PyroModule` that takes the model's arguments.

    Raises:
        BadInput: a model without such a guide: latent sites that exist in some draws only, a support that depends on
            other sites or has no family, no observed site; dependencies with a cycle or an unknown site.
        UnknownName: an unknown word for ``dependencies``.

    Webb et al. 2018, arXiv:1712.00287.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> import torch
    >>> def model(x):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("rows", len(x)):
    ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = amortize(model, torch.randn(8), quiet=True)
    >>> guide.parents
    {'mu': (), 'z': ('mu',)}
    >>> {name: tuple(draw.shape) for name, draw in guide(torch.randn(5)).items()}
    {'mu': (), 'z': (5,)}
    """
    if not callable(model):
        raise BadInput(f"amortize: the model is {type(model).__name__}, expected a Pyro program (something callable)")
    sizes = _sizes(hidden)
    if isinstance(dependencies, str) and dependencies not in DEPENDENCIES:
        raise UnknownName("dependencies", dependencies, DEPENDENCIES)
    if not isinstance(dependencies, (str, Mapping)):
        raise BadInput(f"dependencies is {dependencies!r}: expected a word ({', '.join(DEPENDENCIES)}) or a mapping")
    if order is not None and dependencies != "faithful":
        raise BadInput("order is what 'faithful' dependencies are found in: leave it out for others")
    args = tuple(readable(value, place, "amortize") for place, value in enumerate(args))
    kwargs = {name: readable(value, name, "amortize") for name, value in kwargs.items()}
    if not any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        for name, value in (*enumerate(args), *kwargs.items()):
            refuse_table(value, name, "amortize")
    like = next((t for _, t in tensors_in((args, kwargs)) if t.is_floating_point()), torch.empty(()))
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    like = next((p for p in parameters if p.is_floating_point()), like)
    with _streams_kept(like.device):
        structure = read(model, args, kwargs)
        look = structure.first
        _check_encoder(encoder, look)
        inverse = _inverse(structure, dependencies, order)
        guide = AmortizedGuide(
            model,
            structure,
            inverse,
            args,
            kwargs,
            hidden=sizes,
            encoder=encoder,
            dependencies=dependencies if isinstance(dependencies, str) else "given",
            found=covariates(model, args, kwargs, look),
            fixed=[plate.name for plate in look.plates.values() if not _varies(model, args, kwargs, plate)],
        ).to(device=like.device, dtype=like.dtype)
        with torch.no_grad(), pyro.get_param_store().scope(), poutine.block():
            guide(*args, **kwargs)
    if not quiet:
        print(guide.table())
    return guide


def _sizes(hidden: Sequence[int] | int | None) -> tuple[int, ...]:
    sizes = (64, 64) if hidden is None else (hidden,) if isinstance(hidden, int) else tuple(hidden)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or isinstance(hidden, bool):
        raise BadInput(f"hidden is {hidden!r}: expected sizes of layers, as in (64, 64)")
    return sizes


def _check_encoder(encoder: Any, look: Look) -> None:
    given = encoder if isinstance(encoder, Mapping) else {} if encoder is None else {"": encoder}
    for name, module in given.items():
        if name and name not in look.latent:
            raise BadInput(f"encoder names {name!r}, which is no latent site (latent: {', '.join(look.latent)})")
        if not isinstance(module, nn.Module):
            raise BadInput(f"encoder{name and f' of {name!r}'} is {type(module).__name__}, expected a torch module")


def _inverse(structure: Structure, dependencies: str | Mapping[str, Sequence[str]], order) -> Inverse:
    look = structure.first
    plates = {name: site.plates for name, site in look.sites.items()}
    faithful = faithful_inverse(
        structure.prior,
        list(look.observed),
        plates=plates,
        summed=[name for name, site in look.sites.items() if site.summed],
        order=order,
    )
    if dependencies == "faithful":
        return faithful
    latent = list(look.latent)
    given: dict[str, tuple[str, ...]] = {}
    if isinstance(dependencies, Mapping):
        for name, above in dependencies.items():
            above = (above,) if isinstance(above, str) else tuple(above)
            for each in (name, *above):
                if each not in latent:
                    raise BadInput(
                        f"dependencies name {each!r}, which is no latent site of the model (latent sites:"
                        f" {', '.join(latent)})"
                    )
            given[name] = above
    drawn = drawn_in_model_order(latent, plates, given)
    if dependencies == "full":
        parents = {name: tuple(drawn[:place]) for place, name in enumerate(drawn)}
    else:
        parents = {name: given.get(name, ()) for name in drawn}
    return Inverse(parents, {name: faithful.observed[name] for name in drawn}, faithful.coupled)


def _varies(model: Callable, args: tuple, kwargs: Mapping[str, Any], plate: Plate) -> bool:
    """Whether the plate has one element less where the arguments have."""
    if plate.subsampled or plate.size < 2:
        return plate.subsampled

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                value = value.narrow(axis, 0, size - 1) if size == plate.size else value
            return value
        if isinstance(value, Mapping):
            return {key: cut(one) for key, one in value.items()}
        return type(value)(map(cut, value)) if type(value) in (list, tuple) else value

    try:
        with poutine.block(), torch.no_grad():
            found = look_at(model, cut(args), cut(dict(kwargs))).plates.get(plate.name)
    except Exception:  # code of the user's on arguments that it need not take
        return False
    return found is not None and found.size == plate.size - 1


@contextmanager
def _streams_kept(device: torch.device) -> Iterator[None]:
    """Torch's, NumPy's and Python's random streams are afterwards where they were."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])

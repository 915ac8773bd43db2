"""Networks that read the observed data of a plate's elements, and heads that compute a site's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import one_hot

from ..errors import BadInput
from ..models._networks import beside_each_other, mlp
from ._conditionals import INITIAL_SCALE, Family
from ._structure import Covariate, Look, Plate, Seen, bare

ACTIVATION = "silu"
MOST_CLASSES = 64  # the most values of an observed integer for a one-hot input
WIDEST = 256  # the most numbers to concatenate; more are pooled or left out
REACH = 3.0  # the bound of a parent's value as input of scales and networks
MOST_MOMENTS = 8  # the most features of a set's element whose products are averaged


def aligned(value: Tensor, batch_dims: int, depth: int) -> Tensor:
    """``(*batch, …)`` padded on the left to ``depth`` batch dimensions."""
    return value.reshape((1,) * max(0, depth - batch_dims) + value.shape)


class Convolutions(nn.Module):
    """Features of images ``(..., channels, height, width)``: convolutions of stride 2 until the image is small."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        inputs, channels, (height, width) = shape[0], 16, shape[1:]
        while max(height, width) > 4 and len(layers) < 6:
            layers += [nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.SiLU()]
            inputs, channels = channels, 2 * channels
            height, width = (height + 1) // 2, (width + 1) // 2
        self.layers, self.size = nn.Sequential(*layers), inputs * height * width

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[:-3]
        return self.layers(x.reshape(-1, *x.shape[-3:])).reshape(*batch, self.size)


class Recurrent(nn.Module):
    """A bidirectional recurrent network over sequences ``(..., T, features)`` of any length T.

    With ``valid`` ``(..., T)``, a step that is not valid does not change the state, so that padding has no effect.
    """

    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.ahead, self.back = nn.GRU(inputs, size), nn.GRU(inputs, size)
        self.size = 2 * size

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States at every step ``(..., T, size)``, and those at the ends ``(..., size)``."""
        batch, steps = x.shape[:-2], x.shape[-2]
        flat = x.reshape(-1, steps, x.shape[-1]).transpose(0, 1)
        keep = None if valid is None else valid.expand(*batch, steps).reshape(-1, steps).T.unsqueeze(-1)
        ahead, back = (
            self._run(self.ahead, flat, keep),
            self._run(self.back, flat.flip(0), None if keep is None else keep.flip(0)),
        )
        states = torch.cat([ahead, back.flip(0)], -1).transpose(0, 1).reshape(*batch, steps, self.size)
        return states, torch.cat([ahead[-1], back[-1]], -1).reshape(*batch, self.size)

    def _run(self, cell: nn.GRU, x: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return cell(x)[0]
        state, states = x.new_zeros(x.shape[1], cell.hidden_size), []
        weights = (cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0, cell.bias_hh_l0)
        for step, stays in zip(x, keep, strict=True):
            state = torch.where(stays, torch.gru_cell(step, state, *weights), state)
            states.append(state)
        return torch.stack(states)


class Reader(nn.Module):
    """One observed site as network input ``(*plates, size)``, with masked and missing values set to zero."""

    def __init__(self, seen: Seen, hidden: int):
        super().__init__()
        support, event = bare(seen.support), tuple(seen.event_shape)
        self.classes, self.lower, self.logs = 0, 0, False
        if isinstance(support, constraints.integer_interval):
            lower, upper = (torch.as_tensor(bound) for bound in (support.lower_bound, support.upper_bound))
            values = int(upper.max()) - int(lower.min()) + 1
            if 2 < values <= MOST_CLASSES:
                self.classes, self.lower = values, int(lower.min())
        value = self._plain(seen)
        valid = self._valid(seen, value)
        self.masked = valid is not None
        known = value if valid is None else value[valid.expand(value.shape)]
        self.logs = bool(
            type(support).__name__ in ("_IntegerGreaterThan", "_GreaterThan", "_GreaterThanEq")
            and known.numel()
            and known.max() > 10
        )
        loc, scale = known.mean() if known.numel() else 0.0, known.std() if known.numel() > 1 else 1.0
        zero_one = known.numel() and known.min() >= 0 and known.max() <= 1
        self.register_buffer("loc", torch.as_tensor(0.0 if zero_one else loc))
        self.register_buffer("scale", torch.as_tensor(1.0 if zero_one or not scale > 0 else scale))
        width = max(1, self.classes) * (2 if self.logs else 1) + self.masked
        self.rank, self.kind, self.network = len(event), "plain", None
        if len(event) == 3 and min(event[1:]) >= 5:
            self.kind, self.network = "convolution", Convolutions((event[0] * width, *event[1:]))
            self.size = self.network.size
        elif len(event) == 2 and min(event) >= 8 and event[0] == event[1]:
            self.kind, self.network = "convolution", Convolutions((width, *event))
            self.size = self.network.size
        elif len(event) == 2 and event[0] > 1:
            self.kind, self.network = "recurrent", Recurrent(width * event[1], hidden)
            self.size = self.network.size
        else:
            self.size = width * math.prod(event)
        self.event = event

    def _plain(self, seen: Seen) -> Tensor:
        value = seen.value.expand(seen.batch_shape + seen.event_shape)
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())

    def _valid(self, seen: Seen, value: Tensor) -> Tensor | None:
        """Which values are valid ``(*batch, *event)``; None if nothing is masked or missing."""
        valid = None
        if isinstance(seen.mask, Tensor):
            rank = len(seen.event_shape)
            valid = seen.mask.reshape(seen.mask.shape + (1,) * rank).expand(value.shape)
        if getattr(self, "masked", True) and value.isnan().any():
            valid = ~value.isnan() if valid is None else valid & ~value.isnan()
        return valid

    def forward(self, seen: Seen) -> Tensor:
        value = self._plain(seen)
        if tuple(seen.event_shape) != self.event and self.kind != "recurrent":
            raise BadInput(
                f"site {seen.name!r} has event shape {tuple(seen.event_shape)}, and the guide was built for"
                f" {self.event}"
            )
        valid = self._valid(seen, value) if self.masked else None
        if valid is None and self.masked:
            valid = torch.ones_like(value, dtype=torch.bool)
        if valid is not None:
            value = torch.where(valid, value, torch.zeros_like(value))
        if self.classes:
            parts = [one_hot((value - self.lower).long().clamp(0, self.classes - 1), self.classes).to(value.dtype)]
        else:
            parts = [((value - self.loc) / self.scale).unsqueeze(-1)]
            if self.logs:
                parts.append(torch.log1p(value.clamp(min=0)).unsqueeze(-1))
        if valid is not None:
            parts = [part * valid.unsqueeze(-1) for part in parts] + [valid.unsqueeze(-1).to(value.dtype)]
        x = torch.cat(parts, -1)
        if self.kind == "convolution":
            x = x.movedim(-1, -3) if self.rank == 2 else x.movedim(-1, -4).flatten(-4, -3)
            return self.network(x)
        if self.kind == "recurrent":
            steps = None if valid is None else valid.flatten(-1).any(-1)
            return self.network(x.flatten(-2), steps)[1]
        return x.flatten(value.dim() - self.rank)


class Beside(nn.Module):
    """A covariate as network input: ``(*plates, size)``."""

    def __init__(self, covariate: Covariate, value: Tensor):
        super().__init__()
        self.covariate = covariate
        value = value.to(torch.get_default_dtype())
        rest = [size for axis, size in enumerate(value.shape) if axis not in dict(covariate.axes).values()]
        self.size = math.prod(rest)
        finite = value[value.isfinite()]
        self.register_buffer("loc", finite.mean())
        self.register_buffer("scale", finite.std() if finite.numel() > 1 and finite.std() > 0 else torch.ones(()))

    def forward(self, value: Tensor, plates: Mapping[str, Plate], depth: int) -> Tensor:
        axes = dict(self.covariate.axes)
        for name, axis in axes.items():
            plate = plates[name]
            if value.shape[axis] == plate.full_size != plate.size and plate.rows is not None:
                value = value.index_select(axis, plate.rows.to(value.device))
            if value.shape[axis] != plate.size:
                raise BadInput(
                    f"{self.covariate.name} has {value.shape[axis]} rows where plate {name!r} has {plate.size}"
                )
        value = torch.nan_to_num(((value - self.loc) / self.scale).to(self.loc.dtype))
        order = sorted(axes, key=lambda name: plates[name].dim)
        rest = [axis for axis in range(value.dim()) if axis not in axes.values()]
        value = value.permute(*(axes[name] for name in order), *rest)
        value = value.reshape(*value.shape[: len(order)], -1)
        if value.shape[-1] != self.size:
            raise BadInput(
                f"{self.covariate.name} has {value.shape[-1]} numbers a row, and the guide was built for {self.size}"
            )
        shape = [1] * depth
        for name in order:
            shape[plates[name].dim] = plates[name].size
        return value.reshape(*shape, self.size)


class Pool(nn.Module):
    """A set encoder: means over a plate of each element's features, of their products, and of a network's outputs."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.network = mlp([inputs, hidden, hidden], ACTIVATION)
        self.products = inputs <= MOST_MOMENTS
        self.size = inputs + (inputs * inputs if self.products else 0) + hidden + 1

    def forward(self, x: Tensor, valid: Tensor | None, dims: Sequence[int]) -> Tensor:
        """``x`` is ``(*plates, inputs)``; the plates of ``dims`` (as of a batch, from the right) become one row."""
        parts = [x, self.network(x)]
        if self.products:
            parts.append((x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2))
        every = torch.cat(parts, -1)
        axes = [dim - 1 for dim in dims]
        weight = torch.ones_like(x[..., :1]) if valid is None else valid.to(x.dtype).unsqueeze(-1).expand_as(x[..., :1])
        count = weight.sum(axes, keepdim=True)
        return torch.cat([(every * weight).sum(axes, keepdim=True) / count.clamp(min=1), torch.log1p(count)], -1)


def flattened(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Concatenate plates of ``(*plates, size)``: their dimensions become one, and their rows features."""
    for dim in sorted(dims):
        x = x.movedim(dim - 1, -1).flatten(-2).unsqueeze(dim - 1)
    return x


class Trunk(nn.Module):
    """Features of each element of some plates, from all observed values inside it.

    Args:
        plates: the plates whose elements are kept separate.
        observed: the sites to read.
        beside: the covariates to read.
        look: a run of the model.
        hidden: the sizes of the layers.
        side_by_side: the inner plates of fixed size, whose rows are concatenated; the rows of others are pooled.
    """

    def __init__(
        self,
        plates: Sequence[str],
        observed: Sequence[str],
        beside: Sequence[tuple[Covariate, Tensor]],
        look: Look,
        hidden: Sequence[int],
        side_by_side: Sequence[str] = (),
    ):
        super().__init__()
        self.plates, self.observed = tuple(plates), tuple(observed)
        width = hidden[-1] if hidden else 16
        self.readers = nn.ModuleList(Reader(look.sites[name], width) for name in observed)
        self.beside = nn.ModuleList(Beside(covariate, value) for covariate, value in beside)
        self.groups: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        for place, name in enumerate(observed):
            inner = tuple(plate for plate in look.sites[name].plates if plate not in self.plates)
            self.groups.setdefault(inner, ([], []))[0].append(place)
        for place, (covariate, _) in enumerate(beside):
            inner = tuple(
                sorted((p for p in covariate.plates if p not in self.plates), key=lambda p: look.plates[p].dim)
            )
            home = next((group for group in self.groups if set(inner) <= set(group) and (inner or not group)), None)
            self.groups.setdefault(inner if home is None else home, ([], []))[1].append(place)
        self.pools = nn.ModuleList()
        self.sizes: list[dict[str, int]] = []
        self.how: list[str] = []
        total = 0
        for inner, (readers, besides) in self.groups.items():
            size = sum(self.readers[place].size for place in readers)
            size += sum(self.beside[place].size for place in besides)
            rows = math.prod(look.plates[name].size for name in inner)
            if inner and set(inner) <= set(side_by_side) and rows * size <= WIDEST:
                self.pools.append(nn.Identity())
                self.sizes.append({name: look.plates[name].size for name in inner})
                total += rows * size
                self.how.append(f"plate {' and '.join(inner)} side by side")
            elif inner:
                self.pools.append(Pool(size, width))
                self.sizes.append({})
                total += self.pools[-1].size
                self.how.append(f"a set encoder over plate {' and '.join(inner)}")
            else:
                self.pools.append(nn.Identity())
                self.sizes.append({})
                total += size
        self.skips = total <= WIDEST
        self.dense = mlp([total, *hidden], ACTIVATION, activate_last=True)
        last = hidden[-1] if hidden else total
        self.size = last + (total if self.skips and hidden else 0)
        kinds = [reader.kind for reader in self.readers if reader.kind != "plain"]
        self.what = ", ".join([*dict.fromkeys(kinds), *self.how, "MLP" if hidden else "linear"])

    def forward(self, look: Look, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        depth, parts = look.depth, []
        for (inner, (readers, besides)), pool, sizes in zip(self.groups.items(), self.pools, self.sizes, strict=True):
            pieces, valid = [], None
            for place in readers:
                seen = look.sites[self.observed[place]]
                pieces.append(aligned(self.readers[place](seen), len(seen.batch_shape), depth))
                if isinstance(seen.mask, Tensor):
                    mask = aligned(seen.mask.expand(seen.batch_shape), len(seen.batch_shape), depth)
                    valid = mask if valid is None else valid | mask
            for place in besides:
                beside = self.beside[place]
                pieces.append(beside(beside.covariate.of(args, kwargs), look.plates, depth))
            x = beside_each_other(pieces)
            dims = [look.plates[name].dim for name in inner]
            if sizes:
                for name, size in sizes.items():
                    if look.plates[name].size != size:
                        raise BadInput(
                            f"plate {name!r} has {look.plates[name].size} elements, and the guide was built for {size};"
                            " build it with encoder=, a module that takes any number"
                        )
                x = flattened(x, dims)
            elif inner:
                x = pool(x, valid, dims)
            parts.append(x)
        x = beside_each_other(parts)
        if not len(self.dense):
            return x
        # Scaled by their number, so that an optimizer step changes the outputs about as much as a parameter.
        made = self.dense(x)
        made = made / math.sqrt(made.shape[-1])
        return torch.cat([x, made], -1) if self.skips else made


class Own(nn.Module):
    """A user's module as the encoder of some plates: it maps the observed values to features per row."""

    def __init__(self, module: nn.Module, plates: Sequence[str], observed: Sequence[str], look: Look):
        super().__init__()
        self.module, self.plates, self.observed = module, tuple(plates), tuple(observed)
        with torch.no_grad():
            self.size = self._features(look).shape[-1]
        self.what = f"your {type(module).__name__}"

    def _features(self, look: Look) -> Tensor:
        values = []
        for name in self.observed:
            seen = look.sites[name]
            value = seen.value
            if isinstance(seen.mask, Tensor):
                mask = seen.mask.expand(seen.batch_shape)
                value = torch.where(mask.reshape(mask.shape + (1,) * len(seen.event_shape)), value, value.new_zeros(()))
            values.append(value)
        found = self.module(*values)
        sizes = [look.plates[name].size for name in self.plates]
        depth = look.depth
        if isinstance(found, Tensor) and list(found.shape[:-1]) == sizes:
            shape = [1] * depth
            for name, size in zip(self.plates, sizes, strict=True):
                shape[look.plates[name].dim] = size
            return found.reshape(*shape, found.shape[-1])
        if isinstance(found, Tensor) and found.dim() == depth + 1:
            return found
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BadInput(
            f"encoder: {type(self.module).__name__} gives {got} for {', '.join(self.observed)}; expected features"
            f" ({', '.join(map(str, sizes))}, F), a row for each element of plate {' and '.join(self.plates)}"
        )

    def forward(self, look: Look, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        return self._features(look)


def starting_numbers(family: Family, loc: Tensor) -> Tensor:
    """Initial inputs of ``family.make``: a narrow Normal at ``loc (..., size)``, or equal probabilities."""
    start = loc.new_zeros(*loc.shape[:-1], family.outputs)
    if family.continuous:
        start[..., : family.size] = loc
        start[..., family.size : 2 * family.size] = math.log(math.expm1(INITIAL_SCALE))
    return start


def squashed(x: Tensor) -> Tensor:
    """The identity near zero, bounded by ``REACH``: scales that follow large values without bound make fits fail."""
    return REACH * torch.tanh(x / REACH)


class LocalHead(nn.Module):
    """A site's parameters from its element's features and its parents' values; means are linear in the latter."""

    def __init__(self, family: Family, features: int, parents: int, hidden: Sequence[int], loc: Tensor):
        super().__init__()
        self.direct = nn.Linear(features + parents, family.outputs)
        self.bent, self.means = None, family.size if family.continuous else family.outputs
        if parents:
            self.bent = mlp([features + parents, *(hidden[-1:] or (16,)), family.outputs], ACTIVATION)
            nn.init.zeros_(self.bent[-1].weight)
            nn.init.zeros_(self.bent[-1].bias)
        with torch.no_grad():
            self.direct.weight.mul_(0.1)
            self.direct.bias.copy_(starting_numbers(family, loc))

    def forward(self, features: Tensor | None, parents: Tensor | None) -> Tensor:
        x = beside_each_other([part for part in (features, parents) if part is not None])
        if self.bent is None or parents is None:
            return self.direct(x)
        near = beside_each_other([part for part in (features, squashed(parents)) if part is not None])
        means, rest = self.direct(x)[..., : self.means], self.direct(near)[..., self.means :]
        return torch.cat([means, rest], -1) + self.bent(near) / math.sqrt(self.bent[-1].in_features)


class GlobalHead(nn.Module):
    """A site's parameters, one row for each element of its plates, plus a function of its parents' values."""

    def __init__(self, family: Family, shape: Sequence[int], parents: int, hidden: Sequence[int], loc: Tensor):
        super().__init__()
        self.family = family
        self.base = nn.Parameter(starting_numbers(family, loc).expand(*shape, family.outputs).clone())
        self.weight, self.bent = None, None
        if parents:
            self.weight = nn.Parameter(self.base.new_zeros(*shape, family.outputs, parents))
            self.bent = mlp([parents, *(hidden[-1:] or (16,)), family.outputs], ACTIVATION)
            nn.init.zeros_(self.bent[-1].weight)
            nn.init.zeros_(self.bent[-1].bias)

    def forward(self, parents: Tensor | None, rows: Mapping[int, Tensor] | None = None) -> Tensor:
        base, weight = self.base, self.weight
        for dim, index in (rows or {}).items():
            base = base.index_select(dim - 1, index)
            weight = None if weight is None else weight.index_select(dim - 2, index)
        if parents is None or weight is None:
            return base
        near, means = squashed(parents), self.family.size if self.family.continuous else self.family.outputs
        far = (weight[..., :means, :] @ parents.unsqueeze(-1)).squeeze(-1)
        rest = (weight[..., means:, :] @ near.unsqueeze(-1)).squeeze(-1)
        return base + torch.cat([far, rest], -1) + self.bent(near) / math.sqrt(self.bent[-1].in_features)

    def centred(self, value: Tensor) -> Tensor:
        """Unconstrained values ``(..., *shape, size)``, standardized by their location and scale at zero parents."""
        loc, raw = self.base[..., : self.family.size], self.base[..., self.family.size : 2 * self.family.size]
        return (value - loc) / (nn.functional.softplus(raw) + INITIAL_SCALE / 10)

"""Information in a guide's latents: KL and activity of each dimension, mutual information with the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...errors import PROGRAM_ERRORS, BadInput
from ..engine.rows import Rows, spaced
from ..engine.scopes import quietly
from ..engine.stored_rows import rows_in
from .alone import changed_alone
from .collection import Collection
from .division import first_sweep
from .naming import Naming
from .runner import Pass, Sweep
from .weights import weight_statistics

_NOTES = {
    "marginal": "KL of each dimension's marginal: the guide or the prior ties them together",
    "point": "the guide is a point, whose KL is infinite",
    "joint": "one KL for the site: the guide or the prior ties its dimensions together",
}


@dataclass(frozen=True)
class Information:
    """``kl``: E[log q − log p] by latent site, in nats, averaged over draws and data; ``notes`` describe exceptions.

    ``kl`` has an entry for each dimension where guide and prior have independent coordinates, or are Normal, so that
    each coordinate's marginal is known; for dependent coordinates the sum of the marginal KLs is below the KL of the
    site. Otherwise the site has a single number. Latents that the guide computes from one joint draw have one number
    together, under their names joined by ``+``, over all data. A point has none. Masked elements count as 0.

    ``active_units``: by local site, whether each dimension's posterior mean varies over the data (Burda et al. 2015,
    arXiv:1509.00519). ``mutual_information``: of data and local latents under the guide, in nats; None where the guide
    has no separate density of the local latents, or one that depends on a row's place (parameters for each datum).
    """

    kl: dict[str, Any]
    active_units: dict[str, Any]
    mutual_information: float | None
    notes: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON."""
        return {
            "kl": {name: value.tolist() for name, value in self.kl.items()},
            "active_units": {name: int(value.sum()) for name, value in self.active_units.items()},
            "mutual_information": self.mutual_information,
            "notes": dict(self.notes),
        }


def information(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    num_samples: int = 100,
    num_data: int = 500,
    num_pairs: int = 200,
    seed: int | None = 0,
    plate: str | None = None,
) -> Information:
    r"""KL and activity of latent dimensions over ``num_data`` rows, mutual information over ``num_pairs`` rows.

    Mutual information is estimated by :math:`E[\log q(z \mid x) - \log \frac1M \sum_m q(z \mid x_m)]` over M rows,
    which is at most log M (Hoffman & Johnson 2016, "ELBO surgery"). ``data`` and ``plate`` are as in
    :func:`~gumbo.inference.evaluate`; the rows are evenly spaced. Raises BadInput as `to_arviz` does.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
    >>> def guide(x):  # the second dimension ignores x
    ...     with pyro.plate("data", len(x)):
    ...         loc = torch.stack([x / 2, torch.zeros_like(x)], -1)
    ...         pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
    >>> found = information(model, guide, torch.linspace(-2.0, 2.0, 60))
    >>> found.active_units, bool(0.1 < found.mutual_information < 0.3), bool(abs(found.kl["z"][1]) < 0.02)
    ({'z': tensor([ True, False])}, True, True)
    """
    rows = rows_in(data).check("data")
    alone, least = False, min(num_data, num_pairs)
    if least < len(rows):
        with suppress(BadInput):  # it is raised again in a run on all rows
            rows, size, *_ = first_sweep(model, guide, rows, least, plate, 1)
            alone = size < len(rows)
    sweep = _sweep(model, guide, rows, num_data if alone else len(rows), plate)
    collection = Collection(sweep, 1, num_samples, frozenset({"vi_stats"}))
    collection.allocate()
    collection.fill(0, sweep, seed)
    found = weight_statistics(collection, Naming(sweep, {}, {}).event_names)
    kl = {name: torch.as_tensor(np.asarray(by[0])) for name, by in collection.kl.items() if by[0] is not None}
    kl |= {name: torch.tensor(by[0], dtype=torch.float64) for name, by in collection.kl_together.items()}
    notes = {name: _NOTES[kind] for name, kind in collection.kl_kinds.items() if kind in _NOTES}
    notes |= dict.fromkeys(collection.kl_together, "the guide computes them from a joint draw: one KL for all data")
    active = {name: torch.as_tensor(found[f"active_{name}"][1][0]) for name in sweep.local if f"active_{name}" in found}
    pairs = _sweep(model, guide, rows, num_pairs if alone else len(rows), plate)
    return Information(kl, active, _mutual(pairs, seed), notes)


def _sweep(model: Callable, guide: Callable, rows: Rows, count: int, plate: str | None) -> Sweep:
    if count < len(rows):
        few = rows[spaced(len(rows), count)]
        try:
            sweep = Sweep(model, guide, few.args, few.kwargs, data_plates=plate)
            if sweep.local and not sweep.outside_data():
                return sweep
        except (BadInput, *PROGRAM_ERRORS):
            pass
    # Programs with a fixed number of rows, and joint latents of all rows, need all rows.
    return Sweep(model, guide, rows.args, rows.kwargs, data_plates=plate)


def _mutual(sweep: Sweep, seed: int | None) -> float | None:
    """Evaluate each row's draw under the guide of every other row, by rotations of the rows."""
    auxiliary = any(name not in sweep.model_sites for name in sweep.guide_sites)
    points = any(sweep.guide_sites[name].point for name in sweep.local)
    if not sweep.local or auxiliary or points or sweep.swept or len(sweep.data_plates) != 1:
        return None
    (plate,) = sweep.data_plates
    size = sweep.sizes[plate]
    args = Rows.of(sweep.args, sweep.kwargs).counted_as(size)
    if _bound_to_places(sweep, args, plate):
        return None
    total, own = None, None
    with quietly(sweep.model, sweep.guide, seed):
        first, _ = sweep.run(1)
        held = {name: sweep.held(first, name) for name in sweep.latents}
        for turn in range(size):
            turned = args[torch.arange(size).roll(turn)]
            again = sweep.guide_run(1, fixed=held, arguments=(turned.args, turned.kwargs))
            density = again.joint_log_prob(sweep.data_plates, sweep.local)[0]
            own = density if own is None else own
            total = density if total is None else torch.logaddexp(total, density)
    return float((own - total + math.log(size)).mean())


def _bound_to_places(sweep: Sweep, args: Rows, plate: str) -> bool:
    """Whether the guide's distribution of a row does not follow the row to another place."""
    numbers = torch.arange(sweep.sizes[plate]).roll(1)
    turned = args[numbers]

    def moved(values: Mapping[str, torch.Tensor]) -> tuple[Pass, Pass]:
        return sweep.run(1, fixed=values, arguments=(turned.args, turned.kwargs))

    with quietly(sweep.model, sweep.guide, 0):
        found = changed_alone(lambda values: sweep.run(1, fixed=values), [(moved, numbers)], plate)
    return found is not None and found[0] == "guide"

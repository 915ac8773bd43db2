"""A batch split over processes: the rows of each process, random streams, costs and means."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ...errors import UnsupportedSite
from ..engine.records import Site
from ..engine.scopes import devices_of, random_states, set_random_states
from ..engine.terms import CostToGo, Layout
from ..estimators._base import SiteView
from .distributed import Processes
from .splittable import Study

COMMON, OWN = "common", "own"


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one process uses, and their fraction of the batch.

    A process without a row runs the first one, so that it joins all collective operations; its weight is 0.
    """

    rows: slice
    weight: float

    @property
    def idle(self) -> bool:
        return self.weight == 0.0


def share_of(count: int, rank: int, world_size: int) -> Share:
    """The contiguous rows of ``count`` for process ``rank`` of ``world_size``; the counts differ by at most one.

    >>> [share_of(9, rank, 2) for rank in range(2)]
    [Share(rows=slice(0, 5, None), weight=0.5555555555555556), Share(rows=slice(5, 9, None), weight=0.4444444444444444)]
    >>> share_of(1, 1, 2).idle
    True
    """
    size, more = divmod(count, world_size)
    start = rank * size + min(rank, more)
    stop = start + size + (rank < more)
    return Share(slice(start, stop), (stop - start) / count) if stop > start else Share(slice(0, 1), 0.0)


class Streams:
    """Torch's default generators as two streams: one that is equal in all processes, and one per process.

    Between steps the generators hold the common stream.
    """

    def __init__(self, seed: int, rank: int, devices: list[torch.device]):
        own = random.Random(f"{seed}/{rank}").getrandbits(63)
        self.devices, self.now = devices, COMMON
        self.aside = [torch.Generator(device).manual_seed(own).get_state() for device in ["cpu", *devices]]

    def use(self, name: str) -> str:
        """Draw from this stream from now on; returns the previous one."""
        before, self.now = self.now, name
        if name != before:
            here = random_states(self.devices)
            set_random_states(self.aside, self.devices)
            self.aside = here
        return before

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        before = self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def state(self) -> list[Tensor]:
        """The state of this process's own stream, between steps."""
        return list(self.aside)

    def load(self, state: list[Tensor]) -> None:
        self.aside = [tensor.cpu() for tensor in state]


class _Placed(Messenger):
    """Innermost around a program: scales every site by its share, and draws it from the stream of its plate."""

    def __init__(self, split: SplitRows, draws: bool):
        super().__init__()
        self.split, self.draws, self.before = split, draws, OWN

    def _pyro_sample(self, msg) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_do_not_trace"):
            return
        local = any(frame.name == self.split.study.plate for frame in msg["cond_indep_stack"])
        factor = self.split.factor(local)
        if factor != 1.0:
            msg["scale"] = msg["scale"] * factor
        if self.draws and not msg["is_observed"]:
            self.before = self.split.streams.use(OWN if local else COMMON)

    def _pyro_post_sample(self, msg) -> None:
        if not self.draws or msg["is_observed"] or site_is_subsample(msg) or msg["infer"].get("_do_not_trace"):
            return
        if self.split.streams.use(self.before) == COMMON:
            self.split.drawn.setdefault(msg["name"], msg["value"].detach())


class SplitRows:
    """A batch split over processes: the rows of each process, random streams, costs and means."""

    def __init__(self, processes: Processes, found: Study, model: nn.Module, guide: nn.Module, seed: int):
        self.processes, self.study, self.model, self.guide = processes, found, model, guide
        self.streams = Streams(seed, processes.rank, devices_of(model, guide))
        self.share = Share(slice(0, 0), 0.0)
        self.drawn: dict[str, Tensor] = {}  # the first draw of each site that is common to all processes
        self._inside = 0

    def take(self, count: int) -> Share:
        return share_of(count, self.processes.rank, self.processes.world_size)

    def factor(self, local: bool) -> float:
        """The factor of a site's terms."""
        if self.share.idle or (local and not self.study.scaled):
            return 1.0
        return self.share.weight

    @contextmanager
    def running(self, share: Share) -> Iterator[None]:
        """Inside, calls of model and guide see the rows of ``share`` as a part of the batch."""
        self.share, self.drawn, self._inside = share, {}, 0
        handles = []
        for program in (self.model, self.guide):
            placed = _Placed(self, draws=program is self.guide)
            handles.append(program.register_forward_pre_hook(partial(self._enter, placed)))
            handles.append(program.register_forward_hook(partial(self._leave, placed), always_call=True))
        try:
            with self.streams.taken(OWN):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, placed: _Placed, *_: Any) -> None:
        self._inside += 1
        if self._inside == 1:  # an autoguide may run the model within itself
            placed.__enter__()

    def _leave(self, placed: _Placed, *_: Any) -> None:
        self._inside -= 1
        if self._inside == 0:
            placed.__exit__(None, None, None)

    def has_rows(self, site: Site) -> bool:
        return self.study.has_rows(site)

    def make_layout(self, **options: Any) -> SplitLayout:
        return SplitLayout(**options, split=self)


@dataclass
class SplitLayout(Layout):
    """A layout whose costs and means include the rows of other processes."""

    split: SplitRows | None = None

    def cost(self, site: Site, costs: CostToGo) -> Tensor:
        split = self.split
        if not split.has_rows(site):
            total = costs.total().detach()
            return split.processes.all_reduce(
                torch.zeros_like(total) if split.share.idle else total.clone(memory_format=torch.contiguous_format)
            )
        if split.share.idle:
            return costs.total()
        # Terms outside the plate were added with this process's share; a row's cost has all of them.
        plate = split.study.plate
        whole = {
            frames: term if any(name == plate for name, _, _ in frames) else term / split.share.weight
            for frames, term in costs.terms.items()
        }
        return CostToGo(whole).total()

    def cost_once(self, site: Site, costs: CostToGo) -> Tensor:
        total = costs.scalar()
        if total.requires_grad and torch.is_grad_enabled() and not self.split.has_rows(site):
            raise UnsupportedSite(
                site.name, site.estimator.name, "the slope of its cost spans all processes; use one process"
            )
        return total

    def surrogate(self, site: Site, view: SiteView) -> Tensor | None:
        if self.split.has_rows(site):
            return site.estimator.surrogate(view)
        with self.split.streams.taken(COMMON):
            surrogate = site.estimator.surrogate(view)
        return None if surrogate is None else self.split.share.weight * surrogate

    def whole(self, total: Tensor) -> Tensor:
        mine = torch.zeros_like(total) if self.split.share.idle else total.detach().clone()
        return self.split.processes.all_reduce(mine)

    def mean(self, site: Site, tensor: Tensor) -> Tensor:
        if not self.split.has_rows(site):
            return tensor.mean()
        found = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        if not self.split.share.idle:
            found[0], found[1] = tensor.detach().sum(dtype=torch.float64), tensor.numel()
        total, count = self.split.processes.all_reduce(found)
        return (total / count).to(tensor.dtype)

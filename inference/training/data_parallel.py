r"""One batch split over processes by its rows, so that the sum of their gradients is the gradient of one process.

A batch of B rows gives the objective :math:`\sum_i s\,\ell_i + g`: terms of each row, which stand in the plate over the
rows and carry its scale s, and terms outside that plate. Process r has :math:`B_r` of the rows. It takes the scale that
one process would have (its own plate says :math:`N/B_r` where one process says :math:`s = N/B`, so a plate that is a
subsample is multiplied by :math:`B_r/B`), and :math:`w_r = B_r/B` of every term outside the plate. Then

.. math:: \sum_r \Big( \sum_{i \in r} s\,\ell_i + w_r g \Big) = \sum_i s\,\ell_i + g,

and what is linear in these terms, as every pathwise gradient is, needs no more than a sum. An estimator that weighs
:math:`\nabla \log q` by a cost needs that cost as one process has it: at a site of a row, the terms of its row and all
of g; at a site outside the plate, the costs of all processes added up, and then each process answers for its share
:math:`w_r` of what they all compute alike. Draws outside the plate come from a random stream that all processes share,
draws of rows from one of each process's own. Running statistics are means over all rows.

What cannot be had this way is refused: see :func:`study` and :func:`refuse`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ...errors import PROGRAM, BadInput, GumboError, UnsupportedSite
from ..elbo import SiteELBO, SiteELBOModule
from ..engine.looks import looking, one_particle
from ..engine.programs import Program
from ..engine.records import Run, Site
from ..engine.rows import Rows
from ..engine.scopes import devices_of, evaluating
from ..engine.terms import CostToGo, Layout
from ..estimators._base import Draw, Estimator, SiteView
from ..estimators._distributions import has_score_term
from ..stock import TraceEnumELBO
from .distributed import Processes, alone, first_line
from .steps import TorchStep

COMMON, OWN = "common", "own"


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one process takes, and their part of the whole.

    A process for which no row is left runs the first one, so that it does all that the others do, and counts for
    nothing: its weight is 0.
    """

    rows: slice
    weight: float

    @property
    def idle(self) -> bool:
        return self.weight == 0.0


def share_of(count: int, rank: int, world_size: int) -> Share:
    """The rows of ``count`` that process ``rank`` of ``world_size`` takes: neighbours, as many as others or one more.

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
    """Torch's default generators as two streams: one that all processes draw from alike, and one of this process's own.

    Between steps the generators stand in the common one.
    """

    def __init__(self, seed: int, rank: int, devices: list[torch.device]):
        own = random.Random(f"{seed}/{rank}").getrandbits(63)
        self.devices, self.now = devices, COMMON
        self.aside = [torch.Generator(device).manual_seed(own).get_state() for device in ["cpu", *devices]]

    def use(self, name: str) -> str:
        """Draw from this stream from now on; returns the one in use before."""
        before, self.now = self.now, name
        if name != before:
            here = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]
            torch.set_rng_state(self.aside[0])
            for device, state in zip(self.devices, self.aside[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
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
        """Where this process's own stream stands, between steps."""
        return list(self.aside)

    def load(self, state: list[Tensor]) -> None:
        self.aside = [tensor.cpu() for tensor in state]


@dataclass(frozen=True)
class Study:
    """What splitting must know of a program: the plate over the rows, and whether its scale says how many there are."""

    plate: str
    scaled: bool
    run: Run

    def has_rows(self, site: Site) -> bool:
        return any(name == self.plate for name, _, _ in site.frames)


def study(model: nn.Module, guide: nn.Module, batch: Rows) -> Study:
    """Find the plate over the rows, and hold that a row means the same whichever rows stand beside it.

    The programs run on all rows, and again on a part of them at the same draws; every log-probability is compared.

    Raises :class:`~gumbo.errors.BadInput` where no plate follows the rows, and
    :class:`~gumbo.errors.UnsupportedSite` where rows are mixed, by a site or by a layer such as BatchNorm.
    """
    for program in (model, guide):
        for name, module in program.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UnsupportedSite(
                    f"layer {name!r} ({type(module).__name__}) mixes the rows of a batch, which several processes hold "
                    "in parts: use LayerNorm or GroupNorm, or one process"
                )
    if len(batch) < 2:
        raise BadInput("a batch of 1 row cannot be split over several processes: raise batch_size, or use one process")
    part = batch[: len(batch) // 2 + 1] if len(batch) > 2 else batch[:1]
    sizes = len(batch), len(part)
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}), looking(model, guide, *batch.args):
        program = one_particle(model, guide)
        full = program.run(batch.args, batch.kwargs)
        plate = _plate_over_rows(full, _on_part(program, part, sizes, None), sizes)
        found = Study(plate, False, full)
        fixed = {site.name: _first_rows(site, plate, sizes) for site in full.guide if site.latent and not site.settled}
        some = _on_part(program, part, sizes, fixed)
        found = Study(plate, _scaled(found, some, sizes), full)
        difference = _difference(found, full, some, sizes)
        if difference is not None:
            # Layers that draw noise of their own (dropout) differ between any two runs: compare without it.
            with evaluating(model, guide):
                whole = {site.name: Draw(site.value) for site in full.guide if site.name in fixed}
                full = program.run(batch.args, batch.kwargs, fixed=whole)
                some = _on_part(program, part, sizes, fixed)
                difference = _difference(found, full, some, sizes)
    if difference is not None:
        raise UnsupportedSite(
            difference,
            reason="what it says of a row changes with the rows beside it, and several processes hold a part of the "
            "rows each: keep the rows apart, or use one process",
        )
    _refuse_late_sites(found)
    return found


def _on_part(program: Program, part: Rows, sizes: tuple[int, int], fixed: dict[str, Draw] | None) -> Run:
    try:
        return program.run(part.args, part.kwargs, fixed=fixed)
    except GumboError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadInput(
            f"model and guide take {sizes[0]} rows and not {sizes[1]} of them ({first_line(error)}): several processes "
            "hold a part of a batch each, so the plate over the rows must follow their number"
        ) from error


def _plate_over_rows(full: Run, part: Run, sizes: tuple[int, int]) -> str:
    whole, some = (
        {name for site in run.sites for name, _, count in site.frames if count == size}
        for run, size in zip((full, part), sizes, strict=True)
    )
    names = sorted(whole & some)
    if len(names) != 1:
        found = f"these do: {', '.join(names)}" if names else "none does"
        raise BadInput(
            f"several processes split a batch along the one plate that has as many elements as there are rows; {found}"
        )
    return names[0]


def _first_rows(site: Site, plate: str, sizes: tuple[int, int]) -> Draw:
    """The draws of the first rows; a draw outside the plate as it is."""
    for name, dim, _ in site.frames:
        along = dim - site.fn.event_dim
        if name == plate and site.value.dim() >= -along and site.value.shape[along] == sizes[0]:
            return Draw(site.value.narrow(along, 0, sizes[1]))
    return Draw(site.value)


def _scaled(found: Study, part: Run, sizes: tuple[int, int]) -> bool:
    """Whether the scale of the rows' terms is inverse to their number, as that of a subsample is."""
    answers = set()
    for site, other in _pairs(found.run, part):
        if not found.has_rows(site) or site.settled:
            continue
        whole, some = (_number(each.scale) for each in (site, other))
        if whole is None or some is None or whole == 0.0:
            continue
        if math.isclose(whole, some, rel_tol=1e-6):
            answers.add(False)
        elif math.isclose(whole * sizes[0], some * sizes[1], rel_tol=1e-6):
            answers.add(True)
        else:
            raise UnsupportedSite(
                site.name, reason=f"its scale is {whole} for {sizes[0]} rows and {some} for {sizes[1]}"
            )
    if len(answers) > 1:
        raise UnsupportedSite(
            PROGRAM, reason=f"some sites in plate {found.plate!r} are scaled by the number of rows and others are not"
        )
    return answers == {True}


def _number(scale: Any) -> float | None:
    if isinstance(scale, Tensor):
        return scale.item() if scale.numel() == 1 else None
    return float(scale)


def _pairs(full: Run, part: Run) -> Iterator[tuple[Site, Site]]:
    for sites, others in ((full.guide, part.guide), (full.model, part.model)):
        named = {other.name: other for other in others}
        for site in sites:
            if site.name not in named:
                raise UnsupportedSite(site.name, reason="it comes and goes with the rows of a batch")
            yield site, named[site.name]


def _difference(found: Study, full: Run, part: Run, sizes: tuple[int, int]) -> str | None:
    """The first site whose log-probability is another when fewer rows stand beside it."""
    for site, other in _pairs(full, part):
        if site.settled:
            continue
        want, got = site.log_prob.detach(), other.log_prob.detach()
        for name, dim, _ in site.frames:
            if name == found.plate:
                want = want.narrow(dim, 0, sizes[1]) if want.shape[dim] == sizes[0] else want
                got = got * (sizes[1] / sizes[0]) if found.scaled else got
        want, got = torch.broadcast_tensors(want, got)
        finite = want[want.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
        tolerance = (1e-9 if want.dtype == torch.float64 else 1e-4) * (1 + size)
        if not torch.allclose(want, got, rtol=0.0, atol=tolerance, equal_nan=True):
            return site.name
    return None


def _refuse_late_sites(found: Study) -> None:
    """A site outside the plate that runs after draws of rows may depend on all of them."""
    for sites in (found.run.guide, found.run.model):
        met = None
        for site in sites:
            if found.has_rows(site):
                met = met or (site.name if site.latent and not site.settled else None)
            elif met is not None and not site.settled:
                raise UnsupportedSite(
                    site.name,
                    reason=f"it stands outside plate {found.plate!r} and after site {met!r} in it, so that it may "
                    "depend on rows that another process holds: sample it before the plate, or use one process",
                )


def refuse(loss: ELBO, module: nn.Module, found: Study) -> None:
    """Say so where the weights or costs of a loss reach over all rows in a way that a sum of gradients cannot give."""
    if isinstance(loss, SiteELBO) and isinstance(module, SiteELBOModule):
        _refuse_site_elbo(loss, module.binding.chosen, found, module.binding.vectorized)
    else:
        _refuse_stock(loss, found)


def _refuse_site_elbo(loss: SiteELBO, chosen: Mapping[str, Estimator], found: Study, vectorized: bool) -> None:
    outside = [site.name for site in found.run.sites if not site.settled and not found.has_rows(site)]
    if loss.target.weighs_rows:
        if loss.plates == "ignore":
            raise UnsupportedSite(
                f"objective {loss.objective!r} with plates='ignore' has one weight for all rows, which several "
                "processes hold in parts: use one process"
            )
        if outside:
            raise UnsupportedSite(
                outside[0],
                reason=f"it stands outside plate {found.plate!r}, so that under objective {loss.objective!r} one "
                "weight spans the rows of all processes: take objective='elbo', or use one process",
            )
    for site in found.run.guide:
        if site.factor or (not site.settled and site.latent and has_score_term(site.fn)):
            raise UnsupportedSite(site.name, reason="it has a score term of its own (score_parts): use one process")
    local = {site.name for site in found.run.guide if found.has_rows(site)}
    mixing = [site.name for site in found.run.model if site.settled and not site.latent and not found.has_rows(site)]
    for name, estimator in chosen.items():
        weighs = type(estimator).surrogate is not Estimator.surrogate
        reason = None
        if name not in local:
            if weighs and estimator.needs_relaxed_model:
                reason = f"it stands outside plate {found.plate!r}, and the slope of its cost spans all processes"
        elif estimator.enumerates and not vectorized:
            reason = "without vectorized particles the rows of all processes are enumerated together"
        elif (weighs or estimator.enumerates) and loss.plates == "ignore":
            reason = "with plates='ignore' its cost spans the rows of all processes"
        elif weighs and mixing and _comes_after_rows(mixing[0], found):
            reason = f"deterministic site {mixing[0]!r} outside plate {found.plate!r} may mix the rows of all processes"
        if reason is not None:
            raise UnsupportedSite(name, estimator.name, f"{reason}; use one process, or another estimator")


def _comes_after_rows(name: str, found: Study) -> bool:
    for site in found.run.model:
        if site.name == name:
            return False
        if site.latent and found.has_rows(site):
            return True
    return False


def _refuse_stock(loss: ELBO, found: Study) -> None:
    outside = [site.name for site in found.run.sites if not site.settled and not found.has_rows(site)]
    drawn = [
        site.name
        for site in found.run.guide
        if site.latent and not site.settled and found.has_rows(site) and not getattr(site.fn, "has_rsample", False)
    ]
    name = type(loss).__name__
    if type(loss) not in (Trace_ELBO, TraceMeanField_ELBO, TraceEnumELBO):
        raise UnsupportedSite(
            f"{name} is not known to be a sum over rows, and several processes add their gradients up: use SiteELBO "
            "or its words, or one process"
        )
    if outside and (type(loss) is TraceEnumELBO or drawn):
        raise UnsupportedSite(
            outside[0],
            reason=f"it stands outside plate {found.plate!r}, and {name} multiplies its terms into the costs of rows "
            "that several processes hold in parts: take an estimator of SiteELBO, or use one process",
        )


class _Placed(Messenger):
    """Innermost around a program: every site with its share, and every draw from the stream of its place."""

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
    """A batch split over processes while the programs run: who takes which rows, streams, costs and means."""

    def __init__(self, processes: Processes, found: Study, model: nn.Module, guide: nn.Module, seed: int):
        self.processes, self.study, self.model, self.guide = processes, found, model, guide
        self.streams = Streams(seed, processes.rank, devices_of(model, guide))
        self.share = Share(slice(0, 0), 0.0)
        self.drawn: dict[str, Tensor] = {}  # the first draw of each site that all processes draw alike
        self._inside = 0

    def take(self, count: int) -> Share:
        return share_of(count, self.processes.rank, self.processes.world_size)

    def factor(self, local: bool) -> float:
        """What a site's terms are multiplied by."""
        if self.share.idle or (local and not self.study.scaled):
            return 1.0
        return self.share.weight

    @contextmanager
    def running(self, share: Share) -> Iterator[None]:
        """Within, calls of model and guide see the rows of ``share`` as a part of the batch."""
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
    """A layout that knows of the rows that other processes hold."""

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
        # Terms outside the plate came in with this process's share of them; a row's cost has all of them.
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

    def mean(self, site: Site, tensor: Tensor) -> Tensor:
        if not self.split.has_rows(site):
            return tensor.mean()
        found = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        if not self.split.share.idle:
            found[0], found[1] = tensor.detach().sum(dtype=torch.float64), tensor.numel()
        total, count = self.split.processes.all_reduce(found)
        return (total / count).to(tensor.dtype)


class ProcessStep(TorchStep):
    """One step of one process of several: its rows' gradient, added up with those of the others.

    All processes must make the same steps on the same batches; each takes its own rows of them.
    """

    def __init__(self, model, guide, loss: ELBO, make_optimizer, batch: Rows, processes: Processes, seed: int):
        self.processes, self.calls = processes, 0
        processes.together(lambda: TorchStep.__init__(self, model, guide, loss, make_optimizer, batch))
        found = processes.together(lambda: self._study(model, guide, loss, batch))
        self.split = SplitRows(processes, found, model, guide, seed)
        if isinstance(self.module, SiteELBOModule):
            self.module.binding.make_layout = self.split.make_layout
            self.module.binding.checks_plates = False  # the study has held rows against fewer of them
        processes.same_as_main(self._tensors())

    def _study(self, model, guide, loss: ELBO, batch: Rows) -> Study:
        found = study(model, guide, batch)
        refuse(loss, self.module, found)
        return found

    def _tensors(self) -> list[Tensor]:
        return [value for value in self.module.state_dict().values() if isinstance(value, Tensor)]

    def __call__(self, batch: Rows) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        number = self.gradients(batch)
        if math.isfinite(number):
            self.optimizer.step()
        self.calls += 1
        if self.calls & (self.calls - 1) == 0:
            self.check_same_state()
        return number

    def gradients(self, batch: Rows) -> float:
        """The loss on the whole batch, and its gradient in ``.grad``, the same in every process."""
        share = self.split.take(len(batch))
        part, spoken = batch[share.rows], self.processes.num_collectives
        value, problem = None, None
        try:
            with self.split.running(share), self.checks():
                value = self.module(*part.args, **part.kwargs)
            value.backward()
        except Exception as error:
            if self.processes.num_collectives != spoken:
                # The others wait in the middle of their step, and would take anything said now for something else.
                raise alone(_as_ours(error), self.processes.rank) from error
            problem = error
        return self._added_up(value, share, problem)

    def _added_up(self, value: Tensor | None, share: Share, problem: Exception | None) -> float:
        processes, parameters = self.processes, [p for p in self.parameters.values() if p.requires_grad]
        counts = share.weight > 0 and problem is None
        drawn = sum(draw.double().sum().item() for draw in self.split.drawn.values())
        said = [
            value.item() if counts else 0.0,
            float(problem is not None),
            *(drawn if index == processes.rank else 0.0 for index in range(processes.world_size)),
            *(float(counts and parameter.grad is not None) for parameter in parameters),
        ]
        device = parameters[0].device if parameters else processes.device
        number, problems, *rest = processes.all_reduce(torch.tensor(said, dtype=torch.float64, device=device)).tolist()
        if problems:
            processes.agree(problem)
        alike, moved = rest[: processes.world_size], rest[processes.world_size :]
        if any(not math.isclose(each, alike[0], rel_tol=1e-6, abs_tol=1e-6) for each in alike if each == each):
            raise UnsupportedSite(
                next(iter(self.split.drawn)),
                reason=f"it stands outside plate {self.split.study.plate!r}, and the processes drew it differently: "
                "what it is drawn from depends on the rows at hand; use one process",
            )
        if math.isfinite(number):
            with torch.no_grad():
                self._add_gradients([p for p, count in zip(parameters, moved, strict=True) if count], counts)
        return number

    def _add_gradients(self, parameters: list[Tensor], counts: bool) -> None:
        kinds: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), members in kinds.items():
            flat = torch.zeros(sum(member.numel() for member in members), dtype=dtype, device=device)
            pieces = flat.split([member.numel() for member in members])
            for member, piece in zip(members, pieces, strict=True):
                if counts and member.grad is not None:
                    piece.copy_(member.grad.reshape(-1))
            self.processes.all_reduce(flat)
            for member, piece in zip(members, pieces, strict=True):
                member.grad = piece.reshape(member.shape).clone()

    def state(self) -> dict[str, Any]:
        """What one process has, and where the own random stream of each process stands; all must ask together."""
        return super().state() | {"streams": self.processes.gather(self.split.streams.state())}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        if "streams" in state:
            self.split.streams.load(state["streams"][self.processes.rank])

    def check_same_state(self) -> None:
        """Every process must hold the same parameters, baselines and buffers.

        Raises :class:`~gumbo.errors.UnsupportedSite` naming the first that has come apart: a running statistic of
        somebody's own that sees one process's rows only.
        """
        sums = {
            name: value.double().sum().item()
            for name, value in self.module.state_dict().items()
            if isinstance(value, Tensor) and not value.is_complex()
        }
        main, *others = self.processes.gather(sums)
        for index, found in enumerate(others, start=1):
            for name, value in main.items():
                other = found.get(name, math.nan)
                if value != value and other != other:
                    continue
                if not math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-9):
                    raise UnsupportedSite(
                        f"{name!r} sums to {value:.9g} in process 0 and to {other:.9g} in process {index}: it is moved "
                        "by each process's own rows; use one process"
                    )


def _as_ours(error: Exception) -> GumboError:
    return error if isinstance(error, GumboError) else GumboError(f"{type(error).__name__}: {first_line(error)}")

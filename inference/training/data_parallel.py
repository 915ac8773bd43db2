r"""One batch split over processes by its rows: the sum of their gradients is the gradient of one process.

A batch of B rows gives the objective :math:`\sum_i s\,\ell_i + g`: terms of each row, which are in the plate over the
rows and have its scale s, and terms outside that plate. Process r has :math:`B_r` of the rows. It uses the scale of a
single process (its own plate gives :math:`N/B_r` where a single process has :math:`s = N/B`, so a subsampling plate is
multiplied by :math:`B_r/B`), and :math:`w_r = B_r/B` of every term outside the plate. Then

.. math:: \sum_r \Big( \sum_{i \in r} s\,\ell_i + w_r g \Big) = \sum_i s\,\ell_i + g,

and a gradient that is linear in these terms, such as every pathwise gradient, only needs a sum. An estimator that
multiplies :math:`\nabla \log q` by a cost needs the cost of a single process: at a site of a row, the terms of its row
and all of g; at a site outside the plate, the sum of the costs of all processes, of which each process contributes its
share :math:`w_r`. Draws outside the plate use a random stream that all processes share, draws of rows use a stream of
each process. Running statistics are means over all rows.

``splittable.py`` refuses programs that cannot be split; ``split_rows.py`` has a process's rows, streams and costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ...errors import BadInput, GumboError, UnsupportedSite, first_line
from ..elbo import SiteELBOModule
from ..engine.rows import Rows
from .distributed import Processes, alone
from .fingerprints import checksum
from .optimizers import laid_as
from .shared_memory import SharedMemory
from .split_rows import Share, SplitRows
from .splittable import Study, refuse, study
from .steps import TorchStep


class ProcessStep(TorchStep):
    """One step of one process of several: the gradient of its rows, summed with those of the others.

    All processes must make the same steps on the same batches; each uses its own rows.
    """

    def __init__(self, model, guide, loss: ELBO, make_optimizer, batch: Rows, processes: Processes, seed: int):
        self.processes, self.calls = processes, 0
        processes.together(lambda: TorchStep.__init__(self, model, guide, loss, make_optimizer, batch))
        self._agree_on_plates()
        found = processes.together(lambda: self._study(model, guide, loss, batch))
        self.split = SplitRows(processes, found, model, guide, seed)
        if isinstance(self.module, SiteELBOModule):
            self.module.binding.make_layout = self.split.make_layout
            self.module.binding.checks_plates = False  # study() has compared full and partial batches
        processes.same_as_main(self._tensors())
        learned = list(self.parameters.values())
        numbers = 2 + 2 * processes.world_size + len(learned)
        self.memory = SharedMemory.among(processes, numbers, learned) if learned else None

    def _agree_on_plates(self) -> None:
        """A plate that one process finds dependent is dependent for all: each process tests other random rows."""
        if not isinstance(self.module, SiteELBOModule):
            return
        binding = self.module.binding
        found = set().union(*self.processes.gather(binding.mixed_plates)).difference(binding.mixed_plates)
        self.processes.together(lambda: binding.mix(sorted(found)) if found else None)

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
            self._update()
        self.calls += 1
        if self.calls & (self.calls - 1) == 0:
            self.check_same_state()
        return number

    def _update(self) -> None:
        self.optimizer.step()

    def gradients(self, batch: Rows) -> float:
        """The loss on the whole batch; its gradient, the same in every process, is where the optimizer reads it."""
        share = self.split.take(len(batch))
        part, spoken = batch[share.rows], self.processes.num_collectives
        value, problem = None, None
        try:
            self._compare(part)
            with self.split.running(share), self.checks():
                value = self.module(*part.args, **part.kwargs)
            value.backward()
        except Exception as error:
            if self.processes.num_collectives != spoken:
                # The others wait in the middle of their step, and would misread a message sent now.
                raise alone(_as_ours(error), self.processes.rank) from error
            problem = error
        return self._added_up(value, share, problem)

    def _compare(self, part: Rows) -> None:
        """Compare particles here, since within a step the runs would move the stream that all processes share."""
        if isinstance(self.module, SiteELBOModule):
            self.module.initialize(*part.args, **part.kwargs)

    def _added_up(self, value: Tensor | None, share: Share, problem: Exception | None) -> float:
        processes, parameters = self.processes, [p for p in self.parameters.values() if p.requires_grad]
        counts = share.weight > 0 and problem is None
        drawn = sum(draw.double().sum().item() for draw in self.split.drawn.values())
        mine = range(processes.world_size)
        said = [
            value.item() if counts else 0.0,
            float(problem is not None),
            *(drawn if index == processes.rank else 0.0 for index in mine),
            *(float(processes.signal()) if index == processes.rank else 0.0 for index in mine),
            *(float(counts and parameter.grad is not None) for parameter in parameters),
        ]
        kinds: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        header, gradients = self._together(said, list(kinds.values()), counts)
        number, problems, *rest = header.tolist()
        if problems:
            processes.agree(problem)
        alike, signals = (rest[start : start + processes.world_size] for start in (0, processes.world_size))
        moved = rest[2 * processes.world_size :]
        if any(not math.isclose(each, alike[0], rel_tol=1e-6, abs_tol=1e-6) for each in alike if each == each):
            raise UnsupportedSite(
                next(iter(self.split.drawn)),
                reason=f"it is outside plate {self.split.study.plate!r}, and the processes drew it differently: "
                "its distribution depends on the process's rows; use one process",
            )
        if math.isfinite(number):
            self._take(gradients, [p for p, count in zip(parameters, moved, strict=True) if count], kinds.values())
        processes.told = int(max(signals))
        return number

    def _take(self, gradients: list[Tensor], moved: list[Tensor], kinds: Collection[list[Tensor]]) -> None:
        """Put the sums of each kind where the optimizer reads them: of the parameters that have moved."""
        has_gradient = set(map(id, moved))
        for flat, members in zip(gradients, kinds, strict=True):
            pieces = flat.split([member.numel() for member in members])
            for member, piece in zip(members, pieces, strict=True):
                member.grad = laid_as(member, piece.view(member.shape)) if id(member) in has_gradient else None

    def _together(self, said: list[float], kinds: list[list[Tensor]], counts: bool) -> tuple[Tensor, list[Tensor]]:
        """Sum numbers, and the gradients of each kind, over all processes, in one message where that can be.

        Returns:
            The sums of the numbers, and for each kind the summed gradients in one tensor.
        """
        processes, one = self.processes, len(kinds) == 1 and kinds[0][0].dtype in (torch.float32, torch.float64)
        own = gradients_of(kinds, counts)
        if self.memory is not None:
            return self.memory.add_up(said, own)
        like = kinds[0][0] if kinds else torch.empty((), device=processes.device)
        header = torch.tensor(said, dtype=like.dtype if one else torch.float64, device=like.device)
        flat = [
            torch.cat([header] * one + [gradient.detach().reshape(-1) for gradient in gradients]) for gradients in own
        ]
        if one:
            header, gradients = processes.all_reduce(flat[0]).split([len(said), len(flat[0]) - len(said)])
            return header, [gradients]
        processes.all_reduce_together([header, *flat])
        return header, flat

    def state(self) -> dict[str, Any]:
        """The state of one process, and every process's own random stream; all processes must call this together."""
        return super().state() | {"streams": self.processes.gather(self.split.streams.state())}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        if "streams" in state:
            self.split.streams.load(state["streams"][self.processes.rank])

    def change_in_main(self, change: Callable[[], object]) -> None:
        """Run code of the user in the main process, and give the others the parameters and buffers that it changed.

        Raises the error of that code in all processes, and BadInput for a buffer that gets another shape or type.
        """
        self.check_same_state()  # a difference would be written over, and not seen

        def changed() -> tuple[dict[str, Any], list[str]] | None:
            before = self._contents()
            change()
            self.check_parameters()
            return None if self._contents() == before else (self._layouts(), self._frozen_now())

        told = self.processes.from_main(changed)
        if told is None:
            return
        layouts, frozen = told
        self.processes.together(lambda: self._refuse_other_layouts(layouts))
        self.processes.same_as_main([tensor for _, tensor in self._shared()])
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name not in frozen)

    def _shared(self) -> list[tuple[str, Tensor]]:
        """What all processes have alike: the parameters and buffers, those outside ``state_dict`` too."""
        named = [(name, value) for name, value in self.module.state_dict().items() if isinstance(value, Tensor)]
        return named + [(name, value.detach()) for name, value in self._unsaved.named()]

    def _frozen_now(self) -> list[str]:
        return [name for name, parameter in self.parameters.items() if not parameter.requires_grad]

    def _contents(self) -> tuple[Any, ...]:
        return self._layouts(), self._frozen_now(), [checksum([tensor]) for _, tensor in self._shared()]

    def _layouts(self) -> dict[str, Any]:
        return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._shared()}

    def _refuse_other_layouts(self, mains: Mapping[str, Any]) -> None:
        mine = self._layouts()
        for name in [*mains, *(name for name in mine if name not in mains)]:
            if mains.get(name) != mine.get(name):
                raise BadInput(
                    f"on_epoch, which only the main process calls, made {name!r} another tensor ({mains.get(name)} "
                    f"there, {mine.get(name)} before): write new values of the same shape and type"
                )

    def check_same_state(self) -> None:
        """Every process must hold the same parameters, baselines and buffers.

        Raises :class:`~gumbo.errors.UnsupportedSite` naming the first that differs: for example a user's running
        statistic that depends on one process's rows only.
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


def gradients_of(kinds: list[list[Tensor]], counts: bool) -> list[list[Tensor]]:
    """This process's gradients, with zeros for what has none, or where it does not count."""
    return [
        [member.grad if counts and member.grad is not None else torch.zeros_like(member) for member in members]
        for members in kinds
    ]


def _as_ours(error: Exception) -> GumboError:
    return error if isinstance(error, GumboError) else GumboError(first_line(error, kind=True))

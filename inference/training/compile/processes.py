"""A compiled step of one process of several: each runs the graph of its own rows, and the gradients are summed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ....errors import UnsupportedSite
from ...engine.constants import ADVICE, Watch
from ...engine.rows import Rows
from ...engine.scopes import private_seed
from ..data_parallel import ProcessStep, gradients_of
from ..distributed import Processes
from ..optimizers import is_dense
from ..split_rows import OWN
from .arguments import Taken
from .capture import Program
from .products import FASTEST
from .step import Adam, CompiledStep, end_of_step, library_for, parts, refuse_other_losses


class CompiledProcessStep(ProcessStep):
    """:class:`~gumbo.inference.training.data_parallel.ProcessStep` with a graph for the rows of a full batch.

    The graph holds the loss of a process's rows and its gradient. The message to the others follows it, and then the
    optimizer: Adam as a second graph, which reads what all processes have written, or torch's own. A batch of another
    size runs uncompiled in all processes, and so does a step at which an estimator reads values.

    Args:
        model, guide, loss, make_optimizer, batch, processes, seed: as for ``ProcessStep``.
        backend, products: as for ``CompiledStep``; the main process chooses the library for all.

    Raises:
        UnsupportedSite: a site that all processes draw together, or an estimator whose processes talk in mid-step.
        BadInput: as for ``CompiledStep``.
    """

    def __init__(
        self,
        model,
        guide,
        loss: ELBO,
        make_optimizer,
        batch: Rows,
        processes: Processes,
        seed: int,
        backend: Callable | None = None,
        products: str = FASTEST,
    ):
        refuse_other_losses(loss)
        super().__init__(model, guide, loss, make_optimizer, batch, processes, seed)
        share = self.split.take(len(batch))
        rows = batch[share.rows]
        with self.split.running(share):
            processes.together(lambda: self._refuse_messages(rows))
            self.products = processes.from_main(lambda: library_for(self.module, products, rows))
            self.part = processes.together(lambda: _Part(self, rows, backend))
        self.part.watch()  # without the hooks of this context
        self.takes = Taken(batch)
        self.compiler, self.note = self.part.compiler, self.part.note
        self.update: _Update | None = None
        self._together_inside = False
        processes.together(self._make_update)

    def _make_update(self) -> None:
        """A graph of the optimizer's step, where its gradients are in memory that the processes share."""
        learned = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        used = [self.parameters[name] for name in self.part.program.used]
        inside = None
        # The graph is made with copies, which have no gaps between their elements: parameters must have none either.
        if (
            self.memory is not None
            and len({(one.dtype, one.device) for one in learned}) == 1
            and all(map(is_dense, used))
        ):
            inside = Adam.serving(self.optimizer, used)
        self.update = None if inside is None else _Update(self.part, inside, learned, self.processes.world_size)

    @property
    def seconds(self) -> float:
        """The time for capture, compilation and comparison."""
        return self.part.seconds

    def _refuse_messages(self, rows: Rows) -> None:
        """Refuse what a graph cannot hold: draws that all processes share, and messages in the middle of a step."""
        for site in self.split.study.run.guide:
            if site.random and not self.split.has_rows(site):
                raise UnsupportedSite(
                    site.name,
                    reason=f"it is outside plate {self.split.study.plate!r}, and in compiled steps each process draws"
                    f" for its own rows only: {ADVICE}, or use one process",
                )
        before = self.processes.num_collectives
        with private_seed(None, self.module):
            self.module.initialize(*rows.args, **rows.kwargs)
            Program(self.module, rows)
        if self.processes.num_collectives != before:
            words = ", ".join(sorted({estimator.name for estimator in self.module.binding.chosen.values()}))
            raise UnsupportedSite(
                f"{words}: the averages over the rows of all processes need a message in mid-step, which no graph "
                f"holds: {ADVICE}, or use one process"
            )

    def _update(self) -> None:
        if self._together_inside:
            self.update(self._written)
            end_of_step(self.optimizer)
        else:
            if self.update is not None:
                self.update.inside.forget()
            super()._update()

    def _together(self, said: list[float], kinds: list[list[Tensor]], counts: bool) -> tuple[Tensor, list[Any]]:
        if not self._together_inside:
            return super()._together(said, kinds, counts)
        return self.memory.written(said, gradients_of(kinds, counts))

    def _take(self, gradients: list[Any], moved: list[Tensor], kinds: Collection[list[Tensor]]) -> None:
        if not self._together_inside:
            return super()._take(gradients, moved, kinds)
        (self._written,) = gradients
        for parameter in moved:
            parameter.grad = None  # of this process's rows only

    def gradients(self, batch: Rows) -> float:
        self._together_inside = False
        if not self.takes(batch) or self.part.must_run_uncompiled():
            return super().gradients(batch)
        share = self.split.take(len(batch))
        rows = batch[share.rows]
        value, problem = None, None
        try:
            if self.part.is_outdated():
                with self.split.running(share):
                    self.part.make_graph(rows)
                self.part.watch()  # without the hooks of this context
                self.update = None
            if self.update is None or self.update.is_outdated():
                self._make_update()
            with self.split.streams.taken(OWN):
                value = self.part.gradients(rows)
        except Exception as error:
            problem = error
        self._together_inside = self.update is not None
        return self._added_up(value, share, problem)


class _Update:
    """Adam's step from the gradients that the processes have written, as one graph: their sum is not stored.

    Args:
        part: compiles, and says which parameters learn.
        inside: Adam of these parameters.
        learned: all parameters of which each process has written a gradient, one after the other.
        count: how many processes.
    """

    def __init__(self, part: _Part, inside: Adam, learned: Sequence[Tensor], count: int):
        self.part, self.inside, self.watch = part, inside, Watch()
        inside.add_to(self.watch)
        self.watch.add_layouts(lambda: [*inside.parameters, *inside.state()])
        ends = dict(zip(map(id, learned), itertools.accumulate(one.numel() for one in learned), strict=True))
        places = [slice(ends[id(one)] - one.numel(), ends[id(one)]) for one in inside.parameters]
        counts = [len(inside.parameters), 3 * len(inside.parameters), count, 1]

        def update(*inputs: Tensor) -> list[Tensor]:
            parameters, state, written, (numbers,) = parts(inputs, counts)
            gradients = []
            for parameter, place in zip(parameters, places, strict=True):
                total = written[0][place] + written[1][place]
                for other in written[2:]:
                    total = total + other[place]
                gradients.append(total.view(parameter.shape))
            inside.update(parameters, gradients, state, numbers, None)
            return [numbers[:1].clone()]

        like = learned[0].detach().new_zeros(sum(one.numel() for one in learned))
        self.run = part.compiler(update, [tensor.detach().clone() for tensor in self._inputs([like] * count)])

    def _inputs(self, written: Sequence[Tensor]) -> list[Tensor]:
        numbers = self.part.program.tensor(self.inside.numbers())
        return [*self.inside.parameters, *self.inside.state(), *written, numbers]

    def __call__(self, written: Sequence[Tensor]) -> None:
        with torch.no_grad():
            self.run(*self._inputs(written))
        self.inside.count()

    def is_outdated(self) -> bool:
        """Whether an option of the optimizer that the graph holds has changed, or the strides that it reads with."""
        return self.watch.sees_a_change()


class _Part(CompiledStep):
    """The graph of one process's rows: their loss and its gradient, without the optimizer."""

    def __init__(self, whole: CompiledProcessStep, rows: Rows, backend: Callable | None):
        self.module, self.loss, self.batch = whole.module, whole.loss, rows
        self.parameters, self.optimizer, self._frozen = whole.parameters, whole.optimizer, whole._frozen
        self._begin(rows, backend, whole.products)

    def _optimizer_inside(self) -> Adam | None:
        return None

    def gradients(self, rows: Rows) -> Tensor:
        """The loss of these rows; its gradient is left in ``.grad``."""
        self.noise.draw()
        with torch.no_grad():
            told, *gradients = self.run(*self._inputs(rows))
        self._check_support(told[1:].tolist())
        self.module.binding.steps += 1
        self._put(gradients)
        return told[0]

"""A compiled step of one process of several: each runs the graph of its own rows, and the gradients are summed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.infer import ELBO
from torch import Tensor

from ....errors import UnsupportedSite
from ...engine.constants import ADVICE
from ...engine.rows import Rows
from ...engine.scopes import private_seed
from ..data_parallel import ProcessStep
from ..distributed import Processes
from ..split_rows import OWN
from .capture import Program
from .products import FASTEST
from .step import Adam, CompiledStep, library_for, refuse_other_losses, shape_of


class CompiledProcessStep(ProcessStep):
    """:class:`~gumbo.inference.training.data_parallel.ProcessStep` with a graph for the rows of a full batch.

    The graph holds the loss of a process's rows and its gradient; the message to the others and the optimizer follow
    it. A batch of another size runs uncompiled in all processes, and so does a step at which an estimator reads values.

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
        self.shape = shape_of(batch)
        self.compiler, self.note = self.part.compiler, self.part.note

    @property
    def seconds(self) -> float:
        """The time for capture, compilation and comparison."""
        return self.part.seconds

    def _refuse_messages(self, rows: Rows) -> None:
        """Refuse what a graph cannot hold: draws that all processes share, and messages in the middle of a step."""
        for site in self.split.study.run.guide:
            if site.latent and not site.settled and not self.split.has_rows(site):
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

    def gradients(self, batch: Rows) -> float:
        if shape_of(batch) != self.shape or self.part.must_run_uncompiled():
            return super().gradients(batch)
        share = self.split.take(len(batch))
        rows = batch[share.rows]
        value, problem = None, None
        try:
            if self.part.is_outdated():
                with self.split.running(share):
                    self.part.make_graph(rows)
                self.part.watch()  # without the hooks of this context
            with self.split.streams.taken(OWN):
                value = self.part.gradients(rows)
        except Exception as error:
            problem = error
        return self._added_up(value, share, problem)


class _Part(CompiledStep):
    """The graph of one process's rows: their loss and its gradient, without the optimizer."""

    def __init__(self, whole: CompiledProcessStep, rows: Rows, backend: Callable | None):
        self.module, self.loss, self.batch = whole.module, whole.loss, rows
        self.parameters, self.optimizer = whole.parameters, whole.optimizer
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

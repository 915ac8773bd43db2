"""A training step as one compiled graph: the loss, its gradient and the optimizer, without Python in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from pyro.infer import ELBO
from torch import Tensor

from ....errors import BadInput
from ...elbo import SiteELBO
from ...engine.constants import ADVICE, Watch
from ...engine.noise import Noise, Tape
from ...engine.rows import Rows
from ...engine.scopes import private_seed
from ...estimators._base import SiteState
from ..steps import TorchStep, outside_support
from .adam import Adam, end_of_step, parts
from .arguments import Taken, flat, shape_of
from .backends import Replay, inductor
from .capture import Program, capture
from .products import FASTEST, ONEDNN, choose_library, through_onednn

# A stretch of steps ends after so many steps, bytes of batches, or seconds.
LONGEST, AHEAD, SECONDS = 256, 2**26, 1.0
BLOCK = 16  # steps whose noise and numbers are made together


class CompiledStep(TorchStep):
    """:class:`~gumbo.inference.training.steps.TorchStep` as a compiled graph for batches of one shape.

    The programs run in Python during the capture, and not again for batches of the shape of ``batch``. A batch of
    another shape (the last of an epoch) runs uncompiled, and so does one with other values that are no tensors, and a
    step at which an estimator reads values (its state says when; REBAR probes the programs at calls 1, 2, 4, …, 64).
    Adam and AdamW are part of the graph, other optimizers run after it. Before its first use the graph is compared with
    an eager step on the same noise. It is captured again after a change of a plain attribute of the programs, or of
    ``requires_grad`` of a parameter.

    Args:
        model, guide, loss, make_optimizer, batch: as for ``TorchStep``; ``loss`` is a :class:`SiteELBO`.
        backend: maps a graph and example inputs to a function; None is inductor.
        products: the library of its matrix products; see :func:`.products.choose_library`.

    Attributes:
        seconds: the time for capture, compilation and comparison.
        products: the library that was taken.

    Raises:
        BadInput: programs that decide by values, change as they run, or draw random numbers outside torch; no compiler.
    """

    def __init__(
        self,
        model,
        guide,
        loss: ELBO,
        make_optimizer,
        batch: Rows,
        backend: Callable | None = None,
        products: str = FASTEST,
    ):
        refuse_other_losses(loss)
        super().__init__(model, guide, loss, make_optimizer, batch)
        self._begin(batch, backend, library_for(self.module, products, batch))

    def _begin(self, batch: Rows, backend: Callable | None, library: str) -> None:
        self.backend, self.compiler = backend or inductor, self._compiled
        self.products, self.seconds, self.captures = library, 0.0, 0
        self.takes = Taken(batch)
        self.make_graph(batch)

    def make_graph(self, batch: Rows) -> None:
        """Capture and compile the graph for batches of this shape, and compare it with an eager step."""
        start = time.perf_counter()
        self.captures += 1
        if self.captures > 8:
            raise BadInput(
                "what the programs read changes so often that compiling does not pay: keep what changes in a buffer,"
                f" name it in the class attribute 'uncaptured' if no result depends on it, or {ADVICE}"
            )
        self.check_parameters()
        _refuse_gradient_hooks(self.parameters)
        with private_seed(None, self.module):
            self.module.initialize(*batch.args, **batch.kwargs)  # inspects the programs, which a graph cannot do
            self.program = Program(self.module, batch)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self.program.used = [name for name in self.program.used if id(self.parameters[name]) in owned]
            self.noise = self.program.noise
            self.inside = self._optimizer_inside()
            self.takes.of(batch)
            self._scalars: tuple[list[float], Tensor | None] = ([], None)
            self._blocks: bool | None = None  # whether noise may be drawn in blocks
            self._learns = torch.ones((), dtype=self.program.dtype, device=self.program.device)
            inputs = self._inputs(batch)
            example = [tensor.detach() for tensor in inputs]
            graph = capture(self._function(), example)
            self.run = self._code(graph, example)
            if example[-1].is_cuda:
                first = len(inputs) - 1 - len(self.noise.buffers) - len(flat(batch))
                self.run = Replay(self.run, range(first, first + len(flat(batch))), self._mutable)
            self._compare(batch, in_half=_computes_in_half(graph))
        self.watch()
        self.seconds += time.perf_counter() - start
        self.note = f"compiled in {self.seconds:.1f} s"

    def _optimizer_inside(self) -> Adam | None:
        return Adam.serving(self.optimizer, [self.parameters[name] for name in self.program.used])

    def _compiled(self, function: Callable[..., list[Tensor]], examples: list[Tensor]) -> Callable[..., list[Tensor]]:
        """A function of tensors, compiled as the step is."""
        return self._code(capture(function, examples), examples)

    def _code(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., list[Tensor]]:
        """The compiled code of a graph."""
        return self.backend(through_onednn(graph) if self.products == ONEDNN else graph, examples)

    # One step.

    def __call__(self, batch: Rows) -> float:
        if self.must_run_uncompiled() or not self.takes(batch):
            if self.inside is not None:
                self.inside.forget()
            return super().__call__(batch)
        if self.is_outdated():
            self.make_graph(batch)
        self.noise.draw()
        with torch.no_grad():
            told, *gradients = self.run(*self._inputs(batch))
        number, *inside = told.tolist()
        self._check_support(inside)
        self.module.binding.steps += 1
        if math.isfinite(number):
            self._follow(gradients)
        else:
            self._learns.fill_(1)
        return number

    def _check_support(self, inside: Sequence[float]) -> None:
        if not self.check_data or all(inside):
            return
        for checked, good in zip(self.program.checked, inside, strict=True):
            site, distribution = checked.split("\n")
            if not good and site not in self.unchecked:
                raise outside_support(site, distribution)

    def _put(self, gradients: Sequence[Tensor]) -> None:
        """Store the graph's gradients in ``.grad``, where torch's optimizers read them."""
        for name, gradient in zip(self.program.used, gradients, strict=True):
            self.parameters[name].grad = gradient

    # A stretch of steps.

    def stretch(self, batches: Iterator[Rows], made: list[tuple[Rows, float]], most: int) -> None:
        """Run several steps of the graph before their losses are read, for a second at most.

        A step whose loss is not finite leaves the parameters as they are; the steps after it change nothing, and are
        not counted. A batch that the graph does not take ends the stretch.
        """
        if most == 1 or self.inside is None or self.module.binding.elbo.target.reports:
            return super().stretch(batches, made, most)
        batch = next(batches, None)
        if batch is None:
            return
        shape = self.takes.shape
        if self.must_run_uncompiled() or shape_of(batch) != shape or self.is_outdated():
            made.append((batch, self(batch)))
            return
        most = min(most, LONGEST, max(1, AHEAD // max(1, sum(tensor.nbytes for tensor in flat(batch)))))
        before = _generator_states(self.noise)
        given, told = [], []
        rest: Rows | None = None
        end = time.perf_counter() + SECONDS
        # Python between two calls of the graph runs with cold caches and is many times slower: prepare all it needs.
        inputs, run, looks = self._inputs(batch), self.run, self._looking()
        places = len(inputs) - 1 - len(self.noise.buffers)
        fresh = slice(places - self.program.num_tensors, places)
        drawn = slice(places, len(inputs) - 1)
        numbers, noises = self._numbers_ahead(), self._noise_ahead(most)
        follows = getattr(self.optimizer, "every_step", False)
        binding = self.module.binding
        begun = binding.steps
        self.inside.count(0)
        try:
            with torch.no_grad():
                while True:
                    given.append(batch)
                    if self.code_between and told:
                        inputs = self._inputs(batch)  # that code may have put another tensor in the place of a buffer
                    inputs[fresh] = flat(batch)
                    inputs[-1] = next(numbers)
                    inputs[drawn] = next(noises)
                    found = run(*inputs)[0]
                    told.append(found.clone() if found.is_cuda else found)  # a replay has the same result again
                    if follows or looks:
                        binding.steps = begun + len(told)
                    if follows:
                        self.optimizer.scheduler.step()
                    if len(given) >= most or time.perf_counter() > end:
                        break
                    batch = next(batches, None)
                    if batch is None:
                        break
                    if (
                        (looks and self.must_run_uncompiled())
                        or shape_of(batch) != shape
                        or (self.code_between and self.is_outdated())
                    ):
                        rest = batch
                        break
        finally:
            noises.close()
            binding.steps = begun + len(told)
            self.inside.count(len(told))
            self._count_losses(given, told, made, before)
        if rest is not None and all(math.isfinite(loss) for _, loss in made):
            made.append((rest, self(rest)))

    def _noise_ahead(self, most: int) -> Iterator[list[Tensor]]:
        """The noise of the coming steps, drawn in blocks where a block has the same bits as single draws.

        When it is closed, torch's generator is in the state that single draws for the steps made would leave it in.
        """
        noise = self.noise
        if not self._draws_in_blocks():
            while True:
                noise.draw()
                yield noise.buffers
        (like,), (kind,) = noise.buffers, noise.kinds
        done = 0
        while True:
            state, size = torch.get_rng_state(), max(1, min(BLOCK, most - done))
            block, used = _drawn(kind, like.new_empty(size * len(like))), 0
            try:
                for piece in block.split(len(like)) if len(like) else [block] * size:
                    used += 1
                    yield [piece]
            finally:
                if used < size:
                    torch.set_rng_state(state)
                    for _ in range(used):
                        noise.draw()
            done += size

    def _draws_in_blocks(self) -> bool:
        """Whether a block of draws has the bits of single ones: it is tried, once for each graph."""
        noise = self.noise
        if self._blocks is None:
            self._blocks = False
            if len(noise.buffers) == 1 and noise.kinds[0] != "permutation" and not noise.buffers[0].is_cuda:
                (like,), (kind,) = noise.buffers, noise.kinds
                with torch.random.fork_rng(devices=()):
                    torch.manual_seed(0)
                    singly = [_drawn(kind, torch.empty_like(like)) for _ in range(BLOCK)]
                    after = torch.get_rng_state()
                    torch.manual_seed(0)
                    block = _drawn(kind, like.new_empty(BLOCK * len(like)))
                    self._blocks = torch.equal(torch.cat(singly), block) and torch.equal(after, torch.get_rng_state())
        return self._blocks

    def _count_losses(
        self, given: list[Rows], told: list[Tensor], made: list[tuple[Rows, float]], before: list
    ) -> None:
        """Add the losses up to the first that is not finite; the steps after it are undone."""
        binding, count = self.module.binding, len(told)
        found = torch.stack(told).tolist() if told else []
        for number, (batch, (loss, *inside)) in enumerate(zip(given, found, strict=False)):
            self.failed_on = batch
            self._check_support(inside)
            self.failed_on = None
            made.append((batch, loss))
            if not math.isfinite(loss):
                binding.steps -= count - number - 1
                self.inside.forget()
                self._learns.fill_(1)
                for generator, state in before:
                    generator.set_state(state)
                for _ in range(number + 1):
                    self.noise.draw()
                return

    def _follow(self, gradients: Sequence[Tensor]) -> None:
        """The part of the optimizer's step that is not in the graph."""
        if self.inside is not None:
            self.inside.count()
            end_of_step(self.optimizer)
            return
        self.optimizer.zero_grad(set_to_none=True)
        self._put(gradients)
        self.optimizer.step()

    def must_run_uncompiled(self) -> bool:
        """Whether an estimator reads values in this step."""
        steps, states = self.module.binding.steps, self._looking()
        for state in states:
            state.continue_from(steps)
        return any(state.looks_at_values(steps) for state in states)

    def _looking(self) -> list[SiteState]:
        """The states that may read values in some steps."""
        return [state for state in self.module.binding.states.values() if isinstance(state, SiteState)]

    # Inputs and outputs of the graph.

    def _inputs(self, batch: Rows) -> list[Tensor]:
        """Parameters, the optimizer's state, buffers, the batch, noise, and numbers that change with the step."""
        state = self._state()
        buffers = self.program.buffers().values()
        return [*self.parameters.values(), *state, *buffers, *flat(batch), *self.noise.buffers, self._numbers()]

    def _mutable(self) -> list[Tensor]:
        """The tensors that a step changes in place."""
        buffers = self.program.buffers()
        moving = [buffers[name] for name in self.program.moving]
        return [tensor.detach() for tensor in (*self.parameters.values(), *self._state(), *moving)]

    def _state(self) -> list[Tensor]:
        """The optimizer's tensors and whether steps learn, where the optimizer is in the graph."""
        return [] if self.inside is None else [*self.inside.state(), self._learns]

    def _numbers(self, step: int | None = None, ahead: int = 0) -> Tensor:
        values = self.program.scheduled(step) + ([] if self.inside is None else self.inside.numbers(ahead))
        if self._scalars[1] is None:
            self._scalars = (values, self.program.tensor(values))
        elif values != self._scalars[0]:
            self._scalars[1].copy_(self.program.tensor(values))  # in place: a CUDA graph reads this tensor
            self._scalars = (values, self._scalars[1])
        return self._scalars[1]

    def _numbers_ahead(self) -> Iterator[Tensor]:
        """The numbers of the coming steps, made for several steps at once where no scheduler changes them."""
        first, done = self.module.binding.steps, 0
        singly = self._scalars[1].is_cuda or getattr(self.optimizer, "every_step", False)
        while True:
            if singly:
                yield self._numbers(first + done, done)
                done += 1
                continue
            ahead = range(done, done + BLOCK)
            rows = [self.program.scheduled(first + step) + self.inside.numbers(step) for step in ahead]
            yield from self.program.tensor(rows).unbind()
            done += BLOCK

    def _function(self) -> Callable[..., list[Tensor]]:
        """The function to capture: it changes parameters, optimizer and buffers in place.

        It returns the loss and the support checks as one tensor, and the gradients where the optimizer is not included.
        """
        program, inside = self.program, self.inside
        names, buffers = list(self.parameters), list(program.buffers())
        counts = [len(names), len(self._state()), len(buffers)]
        counts += [program.num_tensors, len(self.noise.buffers), 1]

        def step(*inputs: Tensor) -> list[Tensor]:
            parameters, state, buffer, batch, noise, (numbers,) = parts(inputs, counts)
            scheduled = list(numbers[: len(program.schedules)].unbind()) if program.schedules else []
            tape = Tape(self.noise, self.noise.pieces(noise))
            outcome, gradients = program.call_and_differentiate(
                dict(zip(names, parameters, strict=True)),
                dict(zip(buffers, buffer, strict=True)),
                batch,
                tape,
                scheduled,
            )
            found = [gradients[name] for name in program.used]
            loss = outcome.loss
            with torch.no_grad():
                for name, value in outcome.buffers.items():
                    place = buffer[buffers.index(name)]
                    place.copy_(torch.where(state[-1] > 0, value, place) if state else value)
                if inside is not None:
                    learning = [parameters[names.index(name)] for name in program.used]
                    good = loss.isfinite() & (state[-1] > 0)
                    inside.update(learning, found, state[:-1], numbers[len(program.schedules) :], good)
                    state[-1].copy_(good.to(state[-1].dtype))
                    found = []
                seen = [outcome.inside[name].to(loss.dtype) for name in program.checked]
                return [torch.stack([loss, *seen]), *found]

        return step

    # Validity of the graph.

    def _compare(self, batch: Rows, in_half: bool) -> None:
        """Compare the compiled step with an eager one on the same noise; a draw at a threshold may differ once.

        ``in_half`` says whether the graph rounds to 16 bits.
        """
        found = [self._difference(batch, in_half) for _ in range(2)]
        if all(found):
            raise BadInput(
                f"compile: on the same noise the captured step differs from the eager one ({found[0]}): the programs do"
                f" something from call to call that torch does not see; {ADVICE}"
            )

    def _difference(self, batch: Rows, in_half: bool) -> str:
        self.noise.draw()
        mutable = self._mutable()
        before = [tensor.clone() for tensor in mutable]
        with torch.no_grad(), private_seed(None, self.module):
            told, *gradients = self.run(*self._inputs(batch))
            told, gradients = told.clone(), [gradient.clone() for gradient in gradients]
            if self.inside is not None:
                gradients = self._gradients_within(before)
            moved = {name: self.program.buffers()[name].clone() for name in self.program.moving}
            for tensor, value in zip(mutable, before, strict=True):
                tensor.copy_(value)
        with private_seed(None, self.module):
            outcome, expected = self.program.call_and_differentiate(
                self.parameters, self.program.buffers(), flat(batch), Tape(self.noise)
            )
        tolerance = 3e-2 if in_half else _tolerance(told)
        pairs = [("loss", told[:1], outcome.loss.reshape(1))]
        pairs += [(f"buffer {name}", value, outcome.buffers[name]) for name, value in moved.items()]
        pairs += [
            (f"gradient of {name}", g, expected[name]) for name, g in zip(self.program.used, gradients, strict=True)
        ]
        # Gradients are compared relative to the whole gradient: a small one may be rounding error.
        whole = (
            torch.stack([g.norm() for g in expected.values() if g is not None] or [told.new_zeros(())]).norm().item()
        )
        for name, ours, theirs in pairs:
            size = whole if name.startswith("gradient") else theirs.double().norm().item()
            gap = (ours.double() - theirs.double()).norm().item()
            if math.isfinite(size) and not gap <= tolerance * max(size, 1e-2):
                return f"{name} by {gap:.3g} of {size:.3g}"
        return ""

    def _gradients_within(self, before: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of a step of the graph, where the optimizer is part of it."""
        names = list(self.parameters)
        parameters = [before[names.index(name)] for name in self.program.used]
        return self.inside.gradients(parameters, before[len(names) :])

    def watch(self) -> None:
        """Remember the present values of all that the graph treats as constant."""
        watch = Watch(self.module, self.program.replaced)
        # Compiled code reads with the types and strides of its example.
        watch.add_layouts(lambda: [*self.parameters.values(), *self._state(), *self.program.buffers().values()])
        if self.inside is not None:
            self.inside.add_to(watch)
        self._watched, self._learning = watch, [parameter.requires_grad for parameter in self.parameters.values()]

    def is_outdated(self) -> bool:
        """Whether a value that the graph treats as a constant has changed."""
        if self._watched.sees_a_change() or any(map(_has_gradient_hooks, self.parameters.values())):
            return True
        return [parameter.requires_grad for parameter in self.parameters.values()] != self._learning


def refuse_other_losses(loss: ELBO) -> None:
    if not isinstance(loss, SiteELBO):
        raise BadInput(
            f"compile=True takes gumbo's own ELBOs, not {type(loss).__name__}: name an estimator, or {ADVICE}"
        )


def _refuse_gradient_hooks(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if _has_gradient_hooks(parameter):
            raise BadInput(
                f"parameter {name!r} has a hook on its gradient (register_hook), which a captured graph would leave"
                f" out: {ADVICE}"
            )


def _has_gradient_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def library_for(module: torch.nn.Module, asked: str, batch: Rows) -> str:
    """The library for the products of a step on a batch; see :func:`.products.choose_library`."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    rows = max((len(tensor) for tensor in batch.tensors() if tensor.dim()), default=1)
    return choose_library(asked, [module], rows, device)


def _drawn(kind: str, buffer: Tensor) -> Tensor:
    return buffer.uniform_() if kind == "uniform" else buffer.normal_()


def _generator_states(noise: Noise) -> list[tuple[torch.Generator, Tensor]]:
    """The generators that noise is drawn from, and their states."""
    devices = {buffer.device for buffer in noise.buffers}
    found = [torch.cuda.default_generators[device.index] for device in devices if device.type == "cuda"]
    return [(generator, generator.get_state()) for generator in (torch.default_generator, *found)]


def _computes_in_half(graph: torch.fx.GraphModule) -> bool:
    """Whether a graph has numbers of 16 bits, as under ``torch.autocast``."""
    found = (node.meta.get("val") for node in graph.graph.nodes)
    return any(isinstance(one, Tensor) and one.dtype in (torch.bfloat16, torch.float16) for one in found)


def _tolerance(like: Tensor) -> float:
    """The rounding error of a loss and a gradient; far below the effect of a frozen draw."""
    if like.dtype == torch.float64:
        return 1e-8
    return 1e-3 if like.dtype == torch.float32 and not like.is_cuda else 3e-2

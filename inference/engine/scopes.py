"""Scopes for running programs without side effects: param store, seeds, training flags."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.params.param_store import StateDict
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from ...errors import BadInput
from ...options import check_seed
from .contents import closed_over

# Pyro's handlers and param store, and torch's generators, are global to the process: threads take turns.
one_at_a_time = threading.RLock()


def modules_of(*programs: object) -> list[torch.nn.Module]:
    """The programs that are modules (a program may also be a plain function).

    A program that runs another names it by ``inner_program``; both are included.
    """
    found = [one for program in programs for one in (program, getattr(program, "inner_program", None))]
    return [one for one in found if isinstance(one, torch.nn.Module)]


def autoguides_in(program: object) -> list[AutoGuide]:
    """Pyro's autoguides in a program, itself included."""
    roots = modules_of(program, getattr(program, "__self__", None))
    if inspect.isfunction(program):
        named = (program.__globals__.get(name) for name in program.__code__.co_names)
        roots += [one for one in (*closed_over(program), *named) if isinstance(one, torch.nn.Module)]
    return [module for root in roots for module in root.modules() if isinstance(module, AutoGuide)]


@contextmanager
def built_or_not(program: object) -> Iterator[None]:
    """Undo the first call of an autoguide if it raises, so that the next call raises the same error.

    Pyro marks an autoguide as built before it is, and the next call would miss a parameter.
    """
    unbuilt = [one for one in autoguides_in(program) if one.prototype_trace is None]
    try:
        yield
    except BaseException:
        for one in unbuilt:
            one.prototype_trace = None
        raise


def owned_parameters(model: Callable, guide: Callable) -> dict[str, torch.nn.Parameter]:
    """Parameters of both modules as ``model.…`` and ``guide.…``; a shared one occurs once."""
    named: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, program in (("model", model), ("guide", guide)):
        for module in modules_of(program):
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    named[f"{prefix}.{name}"] = parameter
    return named


class Store:
    """A param store of its own that can be entered repeatedly; the global one holds its entries inside.

    Pyro's ``store.scope`` copies and hashes all entries at each entry and exit; here the dictionaries change places.
    """

    def __init__(self) -> None:
        self.params: dict[str, Tensor] = {}
        self._names: dict[Tensor, str] = {}
        self._constraints: dict[str, Any] = {}
        self._outside: list[tuple[Any, ...]] = []

    def __enter__(self) -> Store:
        store = pyro.get_param_store()
        self._outside.append((store._params, store._param_to_name, store._constraints))
        store._params, store._param_to_name, store._constraints = self.params, self._names, self._constraints
        return self

    def __exit__(self, *error: object) -> None:
        store = pyro.get_param_store()
        # ``clear`` makes new dictionaries.
        self.params, self._names, self._constraints = store._params, store._param_to_name, store._constraints
        store._params, store._param_to_name, store._constraints = self._outside.pop()
        for parameter in self.params.values():
            parameter.__dict__.pop("unconstrained", None)  # a weak reference, which cannot be pickled


def _plain(name: str) -> str:
    """A store's name for a module's parameter, in the module's own notation."""
    return name.replace("$$$", ".").removesuffix("_unconstrained")


@contextmanager
def private_store(*programs: object) -> Iterator[None]:
    """A scope of the param store with each module's own values; the outer store does not change.

    Store parameters of plain functions are visible inside, as the same tensors. Entries of another module's training
    are hidden, since a module would take the store's tensor wherever names agree.
    """
    owned: dict[str, int] = {}
    for module in modules_of(*programs):
        root = getattr(module, "_pyro_name", "")
        for name, parameter in module.named_parameters():
            owned[_plain(f"{root}.{name}" if root else name)] = id(parameter)
    store = pyro.get_param_store()
    state = store.get_state()
    stale = [key for key, value in state["params"].items() if owned.get(_plain(key), id(value)) != id(value)]
    kept: StateDict = {
        "params": {key: value for key, value in state["params"].items() if key not in stale},
        "constraints": {key: value for key, value in state["constraints"].items() if key not in stale},
    }
    with store.scope(kept):
        yield


def devices_of(*things: object) -> list[torch.device]:
    """The CUDA devices of the tensors and modules among ``things``."""
    tensors = [thing for thing in things if isinstance(thing, torch.Tensor)]
    tensors += [parameter for module in modules_of(*things) for parameter in module.parameters()]
    return sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=str)


def random_states(devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """The states of torch's generators: the CPU's, then those of CUDA devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def set_random_states(states: Sequence[torch.Tensor], devices: Sequence[torch.device]) -> None:
    """Put the generators in the states that :func:`random_states` gave."""
    torch.set_rng_state(states[0].cpu())
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state.cpu(), device)


@contextmanager
def private_seed(seed: int | None, *things: object) -> Iterator[None]:
    """Seed torch's generators inside and restore them outside; ``seed=None`` keeps the current state."""
    with torch.random.fork_rng(devices=devices_of(*things)):
        if seed is not None:
            check_seed(seed)
            torch.manual_seed(seed)
        yield


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the generators of a device and the CPU's.

    ``torch.manual_seed`` does the same and, for other devices, formats the stack several times, which takes as long as
    a small network.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(int(seed))
    else:
        torch.manual_seed(seed)


@contextmanager
def modes_kept(*programs: object) -> Iterator[None]:
    """Restore every submodule's training flag on exit."""
    flags = [(module, module.training) for root in modules_of(*programs) for module in root.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Flush denormal numbers to zero inside, and restore the setting on exit.

    Moments of weights without gradients decay into that range, where a processor is many times slower.
    """
    tiny = torch.finfo(torch.float32).tiny
    before = (torch.tensor([tiny]) / 2).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def device_of(*programs: object) -> torch.device:
    """The device of the programs' parameters; the CPU if they have none."""
    for module in modules_of(*programs):
        for parameter in module.parameters():
            return parameter.device
    return torch.device("cpu")


class Aside:
    """A private param store and random state that can be entered repeatedly; each continues where it stopped.

    The outer store and generators do not change, also between two entries.
    """

    def __init__(self, seed: int | None, *programs: object):
        self._devices = devices_of(*programs)
        with private_store(*programs):
            self._store = pyro.get_param_store().get_state()
        with private_seed(seed, *programs):
            self._random = random_states(self._devices)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with pyro.get_param_store().scope(self._store), torch.random.fork_rng(devices=self._devices):
            set_random_states(self._random, self._devices)
            yield
            self._random = random_states(self._devices)


def shared_names(model: Callable, guide: Callable) -> list[str]:
    """Names that Pyro's param store gives to two parameters, one of the model and one of the guide."""
    if pyro.settings.get("module_local_params"):
        return []
    named = [
        {_plain(name): id(parameter) for name, parameter in module.named_parameters()}
        for module in modules_of(model, guide)
        if not getattr(module, "_pyro_name", "")
    ]
    if len(named) < 2:
        return []
    return [name for name, parameter in named[0].items() if named[1].get(name, parameter) != parameter]


def check_shared_names(model: Any, guide: Any) -> None:
    """Refuse two networks of one name, which share an entry of the param store and train as one without an error."""
    if not (isinstance(model, pyro.nn.PyroModule) and isinstance(guide, pyro.nn.PyroModule)):
        return
    mine = dict(torch.nn.Module.named_parameters(model, prefix=model._pyro_name))
    for name, parameter in torch.nn.Module.named_parameters(guide, prefix=guide._pyro_name):
        if name in mine and mine[name] is not parameter:
            raise BadInput(
                f"model and guide both have a parameter called {name!r}, which Pyro's param store would take for one;"
                " rename one of the modules"
            )


@contextmanager
def networks_at_hand(*programs: Any) -> Iterator[None]:
    """Let programs whose class sets ``plain_networks = True`` use their networks without ``pyro.module`` statements.

    For use where the param store already has the parameters. Other programs keep Pyro's way, which registers all
    parameters of a network at every use, since their handlers may depend on it.
    """
    plain = [program for program in programs if getattr(type(program), "plain_networks", False)]
    found = [(program.__dict__, program._modules) for program in plain]
    for attributes, networks in found:
        attributes.update(networks)
    try:
        yield
    finally:
        for attributes, networks in found:
            for name in networks:
                attributes.pop(name, None)


@contextmanager
def kept_buffers(*programs: Any) -> Iterator[None]:
    """Restore the buffers of modules (running statistics) on exit, those too that a program has replaced."""
    modules = [program for program in programs if isinstance(program, torch.nn.Module)]
    saved = [kept for module in modules for part in module.modules() for kept in _own_buffers(part)]
    try:
        yield
    finally:
        _put_back(saved)


def _own_buffers(module: torch.nn.Module) -> list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]:
    """The places of a module's own buffers, the buffers, and copies of them."""
    held = module._buffers
    made = [(key, b) for key, b in held.items() if b is not None and not torch.nn.parameter.is_lazy(b)]
    return [(held, key, buffer, buffer.detach().clone()) for key, buffer in made]


def is_writable(tensor: Tensor) -> bool:
    """Whether a tensor can be written to, by programs too: the elements of an expanded one share memory."""
    return not any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _put_back(saved: Iterable[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for held, key, buffer, value in saved:
            if is_writable(buffer):
                buffer.copy_(value)
            held[key] = buffer


@contextmanager
def modules_met() -> Iterator[Collection[torch.nn.Module]]:
    """Collect the modules called inside; their buffers are restored on exit."""
    met: dict[torch.nn.Module, list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]] = {}

    def note(module: torch.nn.Module, inputs: Any) -> None:
        if module not in met:
            met[module] = _own_buffers(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield met.keys()
    finally:
        handle.remove()
        _put_back(kept for saved in met.values() for kept in saved)


@contextmanager
def evaluating(*programs: object) -> Iterator[None]:
    """Modules in evaluation mode inside."""
    with modes_kept(*programs):
        for module in modules_of(*programs):
            module.eval()
        yield


@contextmanager
def quietly(model: Callable, guide: Callable, seed: int | None) -> Iterator[None]:
    """No gradients, evaluation mode, and a private param store and random state.

    The state differs from that of ``torch.manual_seed(seed)``: otherwise a guide trained with the same seed would be
    evaluated on its training noise.
    """
    own = None if seed is None else (seed * 0x9E3779B9 + 0x5EED) % 2**63
    with (
        private_store(model, guide),
        private_seed(own, model, guide),
        evaluating(model, guide),
        built_or_not(guide),
        torch.no_grad(),
    ):
        yield

"""Running a pair of programs and leaving no trace of it: param store, seeds, training flags."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.params.param_store import StateDict
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from ...errors import BadInput
from ...options import check_seed

# Pyro's handlers and its param store, and torch's generators, belong to the process: threads take turns at them.
one_at_a_time = threading.RLock()


def modules_of(*programs: object) -> list[torch.nn.Module]:
    """The programs that are modules (a program may also be a plain function).

    A program that runs another says which by ``inner_program``; both count.
    """
    found = [one for program in programs for one in (program, getattr(program, "inner_program", None))]
    return [one for one in found if isinstance(one, torch.nn.Module)]


def owned_parameters(model: Callable, guide: Callable) -> dict[str, torch.nn.Parameter]:
    """Parameters of both modules as ``model.…`` and ``guide.…``; one that both share is named once."""
    named: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, program in (("model", model), ("guide", guide)):
        for module in modules_of(program):
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    named[f"{prefix}.{name}"] = parameter
    return named


def _plain(name: str) -> str:
    """A store's name for a module's parameter, as the module itself writes it."""
    return name.replace("$$$", ".").removesuffix("_unconstrained")


@contextmanager
def private_store(*programs: object) -> Iterator[None]:
    """A scope of the param store in which each module's own values rule; the store outside stays as it was.

    What plain functions keep in the store is seen inside, under the same tensors. A module would take the store's
    tensor wherever the names agree, so stale entries of another module's training are hidden from it.
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
    """CUDA devices that the tensors and modules among ``things`` live on."""
    tensors = [thing for thing in things if isinstance(thing, torch.Tensor)]
    tensors += [parameter for module in modules_of(*things) for parameter in module.parameters()]
    return sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=str)


@contextmanager
def private_seed(seed: int | None, *things: object) -> Iterator[None]:
    """Torch's generators seeded inside and as they were outside; ``seed=None`` leaves the stream where it stands."""
    with torch.random.fork_rng(devices=devices_of(*things)):
        if seed is not None:
            check_seed(seed)
            torch.manual_seed(seed)
        yield


@contextmanager
def modes_kept(*programs: object) -> Iterator[None]:
    """Every submodule's training flag is afterwards what it was."""
    flags = [(module, module.training) for root in modules_of(*programs) for module in root.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Numbers too small for a float's normal range count as zero, as they were treated before afterwards.

    Moments of weights that get no gradient shrink into that range, where a processor is many times slower.
    """
    tiny = torch.finfo(torch.float32).tiny
    before = (torch.tensor([tiny]) / 2).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def device_of(*programs: object) -> torch.device:
    """Where the programs' parameters live; the CPU if they have none."""
    for module in modules_of(*programs):
        for parameter in module.parameters():
            return parameter.device
    return torch.device("cpu")


class Aside:
    """A private param store and random stream that can be entered again and again; each goes on where it stopped.

    Outside, the store and the generators stay as they are, also between two entries.
    """

    def __init__(self, seed: int | None, *programs: object):
        self._devices = devices_of(*programs)
        with private_store(*programs):
            self._store = pyro.get_param_store().get_state()
        with private_seed(seed, *programs):
            self._random = self._random_state()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with pyro.get_param_store().scope(self._store), torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._random = self._random_state()

    def _random_state(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]


def shared_names(model: Callable, guide: Callable) -> list[str]:
    """Names that Pyro's param store would give to two different parameters, one of the model and one of the guide."""
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
    """Two networks of one name share one entry of the param store and silently train as one."""
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
    """Programs whose class says ``plain_networks = True`` find their networks without a statement for each parameter.

    To be used where the param store knows the parameters already. Other programs keep Pyro's way, which registers all
    parameters of a network at every mention of it, since a handler of theirs may listen to that.
    """
    plain = [program for program in programs if getattr(type(program), "plain_networks", False)]
    found = [(vars(program), program._modules) for program in plain]
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
    """Leave the buffers of modules (running statistics) as they were."""
    modules = [program for program in programs if isinstance(program, torch.nn.Module)]
    before = [(module, dict(module.named_buffers())) for module in modules]
    made = [b for _, buffers in before for b in buffers.values() if not torch.nn.parameter.is_lazy(b)]
    saved = [(buffer, buffer.detach().clone()) for buffer in made]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def modules_met() -> Iterator[Collection[torch.nn.Module]]:
    """The modules that are called within; each buffer of theirs is afterwards what it was before the first call."""
    met: dict[torch.nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(module: torch.nn.Module, inputs: Any) -> None:
        if module not in met:
            made = [b for b in module.buffers(recurse=False) if not torch.nn.parameter.is_lazy(b)]
            met[module] = [(buffer, buffer.detach().clone()) for buffer in made]

    handle = register_module_forward_pre_hook(note)
    try:
        yield met.keys()
    finally:
        handle.remove()
        with torch.no_grad():
            for saved in met.values():
                for buffer, value in saved:
                    buffer.copy_(value)


@contextmanager
def evaluating(*programs: object) -> Iterator[None]:
    """Modules in evaluation mode for a while."""
    with modes_kept(*programs):
        for module in modules_of(*programs):
            module.eval()
        yield


@contextmanager
def quietly(model: Callable, guide: Callable, seed: int | None) -> Iterator[None]:
    """No gradients, evaluation mode, and a param store and random stream of our own.

    The stream is not that of ``torch.manual_seed(seed)``: a guide that was trained under the same seed would be judged
    by the very noise that it was trained on.
    """
    own = None if seed is None else (seed * 0x9E3779B9 + 0x5EED) % 2**63
    with private_store(model, guide), private_seed(own, model, guide), evaluating(model, guide), torch.no_grad():
        yield

"""Running a pair of programs and leaving no trace of it: param store, seeds, training flags."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.params.param_store import StateDict

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

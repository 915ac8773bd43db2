"""What a captured graph holds as constants: a change between steps is in the next one, a change within is refused."""

from __future__ import annotations

import collections
import math
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_steps import F64, SHAPE, agree, data, normal_pair, steps_of
from pyro.nn import PyroModule
from torch import nn

from gumbo.errors import BadInput
from gumbo.guides import NormalGuide
from gumbo.inference import SiteELBO
from gumbo.inference.engine.rows import Rows


class Scale:
    def __init__(self, value):
        self.value = value


class Settings:
    def __init__(self):
        self.factor, self.scale, self.array = 1.0, Scale(1.0), np.ones(2)


FACTOR, FACTORS = 1.0, {"all": [1.0]}


class Constants:
    factor = 1.0


def scale_of(module):
    return FACTOR * FACTORS["all"][0] * module.settings.array[1] * Constants.factor


def enclosed():
    factor = 1.0

    def multiplied(h):
        return h * factor

    def change(value):
        nonlocal factor
        factor = value

    return multiplied, change


class Decoded(PyroModule):
    """A model with every place from which a number may come."""

    common = 1.0

    def __init__(self):
        super().__init__()
        self.decoder, self.activation = nn.Linear(2, math.prod(SHAPE)), nn.Identity()
        self.settings, self.factors = Settings(), [1.0, {"last": torch.ones(())}]
        self.multiplied, self.change = enclosed()
        self.missing = {"array": np.array([1.0, np.nan]), "number": float("nan"), "scalar": np.float32("nan")}

    def more(self, h):
        return self.multiplied(h) * self.factors[0] * self.factors[1]["last"] * self.scales()

    def scales(self):
        return self.settings.scale.value * np.nan_to_num(self.missing["number"], nan=1.0)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            h = self.more(self.activation(self.decoder(z))) * self.common * self.settings.factor
            h = h * scale_of(self)
            pyro.sample("x", dist.Bernoulli(logits=h.reshape(x.shape)).to_event(len(SHAPE)), obs=x)


def hooked(model):
    model.decoder.register_forward_hook(lambda module, given, result: 2 * result)


CHANGES = {
    "attribute over that of the class": lambda model: setattr(model, "common", 2.0),
    "attribute of an object": lambda model: setattr(model.settings, "factor", 2.0),
    "layer": lambda model: setattr(model, "activation", nn.Tanh()),
    "method": lambda model: setattr(model, "more", lambda h: 2 * h),
    "hook": hooked,
    "element of a list": lambda model: model.factors.__setitem__(0, 2.0),
    "tensor in a dictionary in a list": lambda model: model.factors[1].update(last=torch.tensor(2.0)),
    "tensor in a dictionary, written in place": lambda model: model.factors[1]["last"].fill_(2.0),
    "attribute of an object in an object": lambda model: setattr(model.settings.scale, "value", 2.0),
    "scalar of NumPy": lambda model: model.missing.update(number=np.float32(2.0)),
    "element of an array": lambda model: model.settings.array.__setitem__(1, 2.0),
    "variable of a closure": lambda model: model.change(2.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_steps_is_in_the_next_one(change):
    compiled, eager = steps_of(lambda: (Decoded(), NormalGuide(normal_pair()[0])), SiteELBO("pathwise"))
    agree(compiled, eager, [data(dtype=F64)], 1e-10)
    for step in (compiled, eager):
        change(step.module.model)
    agree(compiled, eager, [data(dtype=F64), 1 - data(dtype=F64)], 1e-10, first_step=200)
    assert compiled.captures == 2


def test_a_changed_attribute_of_the_class_is_in_the_next_step(monkeypatch):
    compiled, eager = steps_of(lambda: (Decoded(), NormalGuide(normal_pair()[0])), SiteELBO("pathwise"))
    agree(compiled, eager, [data(dtype=F64)], 1e-10)
    monkeypatch.setattr(Decoded, "common", 2.0)
    agree(compiled, eager, [data(dtype=F64)], 1e-10, first_step=200)


@pytest.mark.parametrize("place", ["global", "element of a global", "attribute of a class"])
def test_a_change_of_what_a_function_reads_is_in_the_next_step(place, monkeypatch):
    compiled, eager = steps_of(lambda: (Decoded(), NormalGuide(normal_pair()[0])), SiteELBO("pathwise"))
    agree(compiled, eager, [data(dtype=F64)], 1e-10)
    if place == "global":
        monkeypatch.setitem(globals(), "FACTOR", 2.0)
    elif place == "element of a global":
        monkeypatch.setitem(FACTORS, "all", [2.0])
    else:
        monkeypatch.setattr(Constants, "factor", 2.0)
    agree(compiled, eager, [data(dtype=F64)], 1e-10, first_step=200)
    assert compiled.captures == 2


def test_what_no_step_reads_may_change(monkeypatch):
    compiled, eager = steps_of(lambda: (Decoded(), NormalGuide(normal_pair()[0])), SiteELBO("pathwise"))
    monkeypatch.setitem(globals(), "UNREAD", 2.0)
    for step in (compiled, eager):
        step.module.model.factors.append("a longer list")
        step.module.model.factors[1]["more"] = 2.0
    agree(compiled, eager, [data(dtype=F64)], 1e-10)
    assert compiled.captures == 1


# --- one value, in whatever holds it -------------------------------------------------------------------------------


@dataclass(slots=True)
class Slotted:
    factor: float = 1.0


class Scaler:
    """Its methods read a global."""

    def factor(self):
        return FACTOR

    @property
    def by_property(self):
        return FACTOR

    def __call__(self):
        return FACTOR


class Named(collections.UserDict):
    """A mapping of somebody's own."""


def by_default(factors=[1.0]):  # noqa: B006
    return factors[0]


def by_keyword(*, factor=1.0):
    return factor


def one():
    return 1.0


def two():
    return 2.0


def multiplied_by(factor):
    return factor


Pair = collections.namedtuple("Pair", "factor")


class Holder(PyroModule):
    """A model with one thing that it holds, and a function that reads a factor from it."""

    def __init__(self, held, read):
        super().__init__()
        self.decoder, self.held, self.read = nn.Linear(2, math.prod(SHAPE)), held, read

    def forward(self, x):
        factor = self.read(self.held)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            h = self.decoder(z) * factor
            pyro.sample("x", dist.Bernoulli(logits=h.reshape(x.shape)).to_event(len(SHAPE)), obs=x)


def item(key):
    return lambda held: held[key], lambda model, monkeypatch: model.held.__setitem__(key, 2.0)


def attribute(held):
    return held.factor


def set_attribute(model, monkeypatch):
    model.held.factor = 2.0


def set_global(model, monkeypatch):
    monkeypatch.setitem(globals(), "FACTOR", 2.0)


def set_held(value):
    return lambda model, monkeypatch: setattr(model, "held", value)


def factor_of(held):
    return 1.0


def set_function(model, monkeypatch):
    monkeypatch.setitem(globals(), "factor_of", lambda held: 2.0)


HELD = {
    "global function": (lambda: None, lambda held: factor_of(held), set_function),
    "namespace": (lambda: SimpleNamespace(factor=1.0), attribute, set_attribute),
    "options of a command": (lambda: Namespace(factor=1.0), attribute, set_attribute),
    "slot": (Slotted, attribute, set_attribute),
    "ordered dictionary": (lambda: collections.OrderedDict(a=1.0), *item("a")),
    "dictionary with a default": (lambda: collections.defaultdict(float, a=1.0), *item("a")),
    "dictionary of somebody's own": (lambda: Named(a=1.0), *item("a")),
    "deque": (lambda: collections.deque([1.0]), *item(0)),
    "list in a named tuple": (
        lambda: Pair([1.0]),
        lambda held: held.factor[0],
        lambda model, monkeypatch: model.held.factor.__setitem__(0, 2.0),
    ),
    "named tuple": (lambda: Pair(1.0), attribute, set_held(Pair(2.0))),
    "global in a method of an object": (Scaler, lambda held: held.factor(), set_global),
    "global in a property of an object": (Scaler, lambda held: held.by_property, set_global),
    "global in a call of an object": (Scaler, lambda held: held(), set_global),
    "default of a function": (
        lambda: by_default,
        lambda held: held(),
        lambda model, monkeypatch: monkeypatch.setattr(by_default, "__defaults__", ([2.0],)),
    ),
    "keyword of a function": (
        lambda: by_keyword,
        lambda held: held(),
        lambda model, monkeypatch: monkeypatch.setitem(by_keyword.__kwdefaults__, "factor", 2.0),
    ),
    "function in a dictionary": (
        lambda: {"factor": one},
        lambda held: held["factor"](),
        lambda model, monkeypatch: model.held.update(factor=two),
    ),
    "keyword of a partial": (
        lambda: partial(multiplied_by, factor=1.0),
        lambda held: held(),
        lambda model, monkeypatch: model.held.keywords.update(factor=2.0),
    ),
    "partial": (
        lambda: partial(multiplied_by, 1.0),
        lambda held: held(),
        set_held(partial(multiplied_by, 2.0)),
    ),
    "distribution": (lambda: dist.Delta(torch.ones(())), lambda held: held.v, set_held(dist.Delta(torch.tensor(2.0)))),
}


@pytest.mark.parametrize("place", HELD)
def test_a_change_of_what_a_program_holds_is_in_the_next_step(place, monkeypatch):
    make, read, change = HELD[place]
    compiled, eager = steps_of(lambda: (Holder(make(), read), NormalGuide(normal_pair()[0])), SiteELBO("pathwise"))
    agree(compiled, eager, [data(dtype=F64)], 1e-10)
    for step in (compiled, eager):
        change(step.module.model, monkeypatch)
    agree(compiled, eager, [data(dtype=F64), 1 - data(dtype=F64)], 1e-10, first_step=200)
    assert compiled.captures == 2


CALLS = 0


class Counting(Holder):
    calls = 0


def count_global(model):
    global CALLS
    CALLS += 1


def count_in_class(model):
    Counting.calls += 1


COUNTERS = {
    "CALLS": count_global,
    "Counting.calls": count_in_class,
    "Counting.held": lambda model: setattr(model.held["own"], "factor", model.held["own"].factor + 1),
    "Counting.named": lambda model: model.named.__setitem__("calls", model.named["calls"] + 1),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_a_counter_that_matters_only_later_is_refused_wherever_it_is(name, monkeypatch):
    """The comparison with the eager step cannot find it: the first steps are equal."""
    monkeypatch.setitem(globals(), "CALLS", 0)
    monkeypatch.setattr(Counting, "calls", 0)

    def late(held):
        model = held["model"]
        COUNTERS[name](model)
        calls = max(CALLS, model.calls, held["own"].factor, model.named["calls"])
        return 1.0 if calls < 1000 else 0.5

    def pair():
        model = Counting({"own": Slotted(0)}, late)
        model.named = collections.Counter(calls=0)
        model.held["model"] = model
        return model, NormalGuide(normal_pair()[0])

    with pytest.raises(BadInput, match=f"^{name} changes as the program runs.*compile=False"):
        steps_of(pair, SiteELBO("pathwise"))


def test_an_object_that_the_program_keeps_for_its_user_is_no_change():
    def keeps(held):
        held["model"].last = dist.Normal(torch.zeros(()), 1.0)
        return 1.0

    def pair():
        model = Holder({}, keeps)
        model.held["model"] = model
        return model, NormalGuide(normal_pair()[0])

    compiled, eager = steps_of(pair, SiteELBO("pathwise"))
    agree(compiled, eager, [data(dtype=F64)], 1e-10)
    compiled(Rows(data(6, dtype=F64), "x"))  # other rows than were captured run uncompiled
    compiled(Rows(data(dtype=F64), "x"))
    assert type(compiled.module.model.last) is dist.Normal and compiled.captures == 1

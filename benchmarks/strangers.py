"""Pyro's own tests and examples under SiteELBO: what passes, what is refused and by which rule, what cannot run here.

    python benchmarks/strangers.py PYRO_SOURCE_TREE [--only test_gradient] [--out benchmarks/results/strangers]

``PYRO_SOURCE_TREE`` is a checkout of Pyro's repository (its packages on the registry hold no tests). Nothing of it is
changed: each test file and each example runs in a process of its own, in which the names ``Trace_ELBO``,
``TraceGraph_ELBO``, ``TraceEnum_ELBO`` and ``TraceMeanField_ELBO`` stand for :class:`gumbo.inference.SiteELBO`:

- SiteELBO has no words at first; where it says that a site has no reparameterized sampler and needs a word, the
  stand-in names ``score`` for such sites and ``pathwise`` for the others; marks of the program (``enumerate``,
  ``baseline``) are left to SiteELBO;
- ``vectorize_particles`` is the option that the test gave. TraceEnum_ELBO enumerates in parallel unless SiteELBO says
  that the program does not vectorize; then the stand-in follows that advice.

The first call on each model and guide is repeated under the stock ELBO and under SiteELBO, each with its own random
draws, and the means of the loss and of every gradient are compared (Welch's z, limit 6, repeated once with four times
the draws). Where stock gradients are known to be biased or where the stock ELBO raises, the table says so.

Outcomes: *passed*; *refused* in one line, tied to a rule of the design by ``RULES`` (a refusal without a rule fails);
*not run*, with the download or package that is missing; *left out*, what takes no value or gradient from these ELBOs;
*failed*. Results come line by line into ``OUT.jsonl`` and, at the end, ``OUT.json`` and ``OUT.md``. The status is 1
where anything failed. ``GUMBO_DATA`` lends its chorales and digits to the examples that would download them.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import gzip
import importlib.util
import json
import math
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO, ELBOModule
from scipy import stats

from gumbo.errors import CannotVectorize, GumboError, UnsupportedSite
from gumbo.inference import SiteELBO

RESULTS = Path(__file__).resolve().parent / "results" / "strangers"
STOCK = {cls.__name__: cls for cls in (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO)}
TESTS = ("tests/infer/test_gradient.py", "tests/infer/test_valid_models.py", "tests/infer/test_enum.py")
OUTCOMES = ("passed", "refused", "not run", "left out", "failed")
LIMIT = 6.0  # of |z|: about 1e-9 two-sided, times some ten thousand comparisons
SLOW = 2.0  # seconds of a call that is not repeated
DIRECTIONS = 24  # how many products with a random direction stand for a long gradient

# Each refusal belongs to one rule of the design's section on gradients: (rule, what is refused, how its line reads).
RULES: list[tuple[int, str, str]] = [
    (6, "marks of the model that ask for no exact sum", r"marks it infer|asks for draws of a site"),
    (3, "sums over values that join terms of different scale", r"joined by the sum"),
    (6, "a site that only one of model and guide has", r"no site in the guide|nowhere in the model|model observes"),
    (6, "more values than can be listed", r"more than the limit of|too many"),
    (6, "a site whose distribution cannot serve the word", r"no reparameterized sampler|has no finite support"),
    (6, "two statements of one name", r"is sampled twice"),
    (6, "marks of Pyro's that have no counterpart", r"num_samples|asks for '"),
    (6, "model and guide that disagree about a site", r"[Ss]hapes? .*disagree|disagree"),
    (
        6,
        "plates that do not fit, as Pyro's own statements find",
        r"give model and guide plates of one size|Shape mismatch|collide at|invalid shape of|block_plate|obs_mask",
    ),
    (6, "a batch dimension outside of any plate", r"outside any plate"),
    (6, "a guide that runs the model itself", r"runs the model itself"),
    (7, "a support that moves with parameters", r"support of .* depends on parameters"),
    (5, "a pmf against a density", r"a pmf|a density"),
    (3, "importance weights that no minibatch can estimate", r"subsampled plate"),
    (9, "programs that mean another thing for K particles at once", r"does not vectorize|values at once|pyro\.markov"),
]

# Tests of which the point is no value and no gradient, by name, with what they ask for instead.
PLACES = "asserts inside the program in which dimensions Pyro puts its own particles and enumerated values"
LEFT_OUT: dict[str, str] = {
    "test_enumerate_sequential_guide": "counts how often Pyro runs the model",
}

# Tests that want an error of Pyro's where SiteELBO works rightly: why it may.
JOINTLY = "elements that a sum ties are listed jointly, and the value is that of every joint value (test_elimination)"
ACCEPTED: dict[str, str] = {
    "test_iplate_in_guide_not_model_error": "the guide's plate holds no site, so that it changes no term",
    "test_elbo_enumerate_plate_5": JOINTLY,
    "test_elbo_enumerate_plates_6": JOINTLY,
    "test_elbo_enumerate_plates_8": JOINTLY,
    "test_enum_in_model_diamond_error": JOINTLY,
}

# Examples that do not run under Pyro's own ELBO here: what fails, and where it comes from.
BROKEN = {"sparse_regression.py": "random.seed refuses the example's NumPy integer on this Python, under any ELBO"}

# Tests that hold one draw, or a few, to the noise of Pyro's own estimator: judged by the means alone.
BY_MEANS: dict[str, str] = {
    "test_particle_gradient": "the numbers of one draw of TraceEnum_ELBO's estimator, which carries its score terms",
    "test_plate": "rule 1: later guide sites stand outside the plate, which is summed (unbiased, more variance)",
}


NO_STAND_IN = "takes no value or gradient from an ELBO that SiteELBO stands in for"


ENOUGH = 25  # steps of an example, which may go on for an hour


class Enough(BaseException):
    """An example has made its steps."""


class NotAValue(Exception):
    """A test asks a stand-in for something other than a loss or a gradient."""


# ---- the stand-in


class Journal:
    """What happened in the test or example that is now running."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.calls = 0
        self.must_compare = False
        self.refusal: GumboError | None = None
        self.expected_error: str | None = None
        self.accepted: str | None = None
        self.comparisons: list[dict[str, Any]] = []
        self.notes: list[str] = []


journal = Journal()


class StandIn(ELBO):
    """One of Pyro's ELBOs by name, as SiteELBO with the words that fit."""

    stock: type[ELBO] = Trace_ELBO
    compare = True
    most_calls = math.inf

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
    ):
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        self.vectorize_particles = vectorize_particles
        self.retain_graph = retain_graph
        self.stock_options = {
            "num_particles": num_particles,
            "max_plate_nesting": max_plate_nesting,
            "vectorize_particles": vectorize_particles,
            "strict_enumeration_warning": False,
        }
        self.words: dict[str, str] = {}
        self.together = vectorize_particles or self.stock is TraceEnum_ELBO
        self.inner: SiteELBO | None = None
        self.compared: list[tuple[Any, Any]] = []

    def make(self) -> SiteELBO:
        nesting = None if self.max_plate_nesting == float("inf") else self.max_plate_nesting
        return SiteELBO(
            self.words or "default",
            num_particles=self.num_particles,
            max_plate_nesting=nesting,
            vectorize_particles=self.together,
        )

    def follow(self, call: Callable[[SiteELBO], Any], model, guide, args, kwargs) -> Any:
        """Make the call, and again with what the message advises where SiteELBO names its own remedy."""
        if journal.calls >= self.most_calls:
            raise Enough
        journal.calls += 1
        while True:
            self.inner = self.inner or self.make()
            self.inner.retain_graph = self.retain_graph
            try:
                return call(self.inner)
            except CannotVectorize as error:
                if not self.together or self.vectorize_particles:
                    journal.refusal = error
                    raise
                self.together, self.inner = False, None
            except UnsupportedSite as error:
                if error.estimator != "default" or self.words:
                    journal.refusal = error
                    raise
                self.words, self.inner = words(model, guide, args, kwargs), None
            except GumboError as error:
                journal.refusal = error
                raise

    def _value(self, method: str, model, guide, args, kwargs):

        def call(elbo: SiteELBO) -> Any:
            return getattr(elbo, method)(model, guide, *args, **kwargs)

        start = time.perf_counter()
        value = self.follow(call, model, guide, args, kwargs)
        if (
            time.perf_counter() - start > SLOW and not journal.must_compare
        ):  # the test holds the value to its own reference; repeats take too long
            return value
        if self.compare and not any(model is m and guide is g for m, g in self.compared):
            self.compared.append((model, guide))
            journal.comparisons.append(against_stock(self, model, guide, args, kwargs))
        return value

    def differentiable_loss(self, model, guide, *args, **kwargs):
        return self._value("differentiable_loss", model, guide, args, kwargs)

    def loss_and_grads(self, model, guide, *args, **kwargs):
        return self._value("loss_and_grads", model, guide, args, kwargs)

    def loss(self, model, guide, *args, **kwargs):
        return self._value("loss", model, guide, args, kwargs)

    def _get_trace(self, model, guide, args, kwargs):
        raise NotAValue("a trace of Pyro's own")

    def compute_marginals(self, *args, **kwargs):
        raise NotAValue("TraceEnum_ELBO.compute_marginals")

    def sample_posterior(self, *args, **kwargs):
        raise NotAValue("TraceEnum_ELBO.sample_posterior")

    def __call__(self, model, guide):
        return StandInModule(model, guide, self)


class StandInModule(ELBOModule):
    """The torch idiom of a stand-in: the module is SiteELBO's own."""

    def __init__(self, model, guide, elbo):
        super().__init__(model, guide, elbo)
        self.inner = None

    def forward(self, *args, **kwargs):
        def call(elbo: SiteELBO):
            if self.inner is None or self.inner.elbo is not elbo:
                self.inner = elbo(self.model, self.guide)
            return self.inner(*args, **kwargs)

        return self.elbo.follow(call, self.model, self.guide, args, kwargs)


STAND_INS = {name: type(name, (StandIn,), {"stock": cls}) for name, cls in STOCK.items()}


def words(model, guide, args, kwargs) -> dict[str, str]:
    """Score functions, as the message advises, but for the sites of the guide that can be reparameterized."""
    with aside():
        nodes = pyro.poutine.trace(guide).get_trace(*args, **kwargs).nodes
    sites = [node for node in nodes.values() if node["type"] == "sample" and not node["is_observed"]]
    marked = ("enumerate", "baseline", "estimator")
    found = {
        site["name"]: "pathwise"
        for site in sites
        if getattr(site["fn"], "has_rsample", False)
        and not any(site["infer"].get(mark) for mark in marked)
        and not isinstance(site["fn"], pyro.distributions.Delta)
    }
    return {**found, "*": "score"}


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Random streams, gradients and parameters come back as they were."""
    store = pyro.get_param_store()
    params = {name: store._params[name] for name in store._params}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in params.items()}
    kept = (store._params.copy(), store._constraints.copy(), store._param_to_name.copy())
    streams = pyro.util.get_rng_state()
    calls = journal.calls, journal.refusal
    try:
        yield
    finally:
        pyro.util.set_rng_state(streams)
        store._params, store._constraints, store._param_to_name = kept
        for name, parameter in params.items():
            parameter.grad = gradients[name]
        journal.calls, journal.refusal = calls


def one_draw(elbo: ELBO, names: list[str], model, guide, args, kwargs) -> torch.Tensor:
    """The loss and the gradient of one call, in one vector; a long gradient by its products with random directions."""
    store = pyro.get_param_store()
    for name in store._params:
        store._params[name].grad = None
    loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
    found = []
    for name in names:
        parameter = store._params[name]
        found.append((torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).detach().flatten())
    gradient = torch.cat([part.double() for part in found]) if found else torch.zeros(0).double()
    if len(gradient) > DIRECTIONS:
        stream = torch.Generator().manual_seed(7)
        signs = (torch.randn(len(gradient), generator=stream).sign().double() for _ in range(DIRECTIONS))
        gradient = torch.stack([(sign * gradient).sum() for sign in signs])
    return torch.cat([torch.tensor([float(loss)]).double(), gradient])


def means(elbo: ELBO, draws: int, seconds: float, *call: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean of `one_draw`, its squared standard error, and how many draws there are."""
    rows, start = [], time.perf_counter()
    while len(rows) < draws and (len(rows) < 6 or time.perf_counter() - start < seconds):
        rows.append(one_draw(elbo, *call))
    table = torch.stack(rows)
    return table.mean(0), table.var(0) / len(rows), len(rows)


def surprise(ours: tuple, theirs: tuple) -> torch.Tensor:
    """For each number the gap of two means as the z-score that is as improbable: Welch's t, since draws are few."""
    found = []
    exact = 1e-9 if torch.get_default_dtype() == torch.float64 else 1e-4
    for a, b, va, vb in zip(ours[0].tolist(), theirs[0].tolist(), ours[1].tolist(), theirs[1].tolist(), strict=True):
        gap = abs(a - b) - exact * (1 + abs(b))
        if not math.isfinite(b) or gap <= 0:  # impossible values make Pyro's own gradients NaN: no reference
            found.append(0.0)
        elif not gap < math.inf or va + vb == 0:
            found.append(math.inf)
        else:
            freedom = (va + vb) ** 2 / (va**2 / (ours[2] - 1) + vb**2 / (theirs[2] - 1))
            found.append(-float(stats.norm.ppf(stats.t.sf(gap / math.sqrt(va + vb), freedom))))
    return torch.tensor(found)


def against_stock(stand: StandIn, *call: Any, draws: int = 8, seconds: float = 1.0) -> dict[str, Any]:
    """Means of loss and gradients under SiteELBO and under the ELBO that it stands in for, on the same parameters."""
    found: dict[str, Any] = {"elbo": stand.stock.__name__}
    names = [n for n, p in pyro.get_param_store()._params.items() if p.requires_grad and not n.startswith("gumbo.")]
    for attempt in (1, 4):
        with aside(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pyro.set_rng_seed(1729 + attempt)
            ours = means(stand.inner, attempt * draws, attempt * seconds, names, *call)
            try:
                theirs = means(stand.stock(**stand.stock_options), attempt * draws, attempt * seconds, names, *call)
            except Exception as error:
                return {**found, "stock_raises": f"{type(error).__name__}: {one_line(error)}"[:200]}
        z = surprise(ours, theirs)
        found |= {
            "draws": [ours[2], theirs[2]],
            "loss": [round(float(ours[0][0]), 4), round(float(theirs[0][0]), 4)],
            "z_loss": round(float(z[0]), 2),
            "z_gradient": round(float(z[1:].max()), 2) if len(z) > 1 else None,
        }
        if float(z.max()) <= LIMIT:
            return found
    return {**found, "differs": True}


# ---- one process: a test file, or an example


def substitute() -> None:
    """Let the names of Pyro's ELBOs mean the stand-ins, for whoever imports them from now on."""
    import pyro.infer.trace_elbo
    import pyro.infer.trace_mean_field_elbo
    import pyro.infer.traceenum_elbo
    import pyro.infer.tracegraph_elbo

    for module in [
        pyro.infer,
        *(
            sys.modules[f"pyro.infer.{name}"]
            for name in ("trace_elbo", "traceenum_elbo", "tracegraph_elbo", "trace_mean_field_elbo")
        ),
    ]:
        for name, stand in STAND_INS.items():
            if hasattr(module, name):
                setattr(module, name, stand)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def rule_of(message: str) -> tuple[int, str] | None:
    return next(((rule, what) for rule, what, pattern in RULES if re.search(pattern, message)), None)


def refused(error: GumboError) -> dict[str, Any]:
    message = str(error)
    found = rule_of(message)
    if "\n" in message:
        return {"outcome": "failed", "reason": f"a refusal of more than one line: {message[:200]!r}"}
    if found is None:
        return {"outcome": "failed", "reason": f"no rule for the refusal: {message}"}
    return {"outcome": "refused", "rule": found[0], "what": found[1], "reason": message}


def judged() -> dict[str, Any]:
    """What the comparisons with the stock ELBO say of a test or example that raised nothing."""
    bad = [c for c in journal.comparisons if c.get("differs")]
    if bad:
        return {"outcome": "failed", "reason": f"differs from {bad[0]['elbo']}: {bad[0]}"}
    return {"outcome": "passed"}


class Plugin:
    """pytest's side: which outcome each test has, written as it comes."""

    def __init__(self, out: Path, skip: set[str], seconds: int):
        self.out, self.skip, self.seconds = out, skip, seconds

    def pytest_collection_modifyitems(self, config, items) -> None:
        items[:] = [item for item in items if item.nodeid not in self.skip]

    def pytest_collection_finish(self, session) -> None:
        for module in {item.module for item in session.items}:
            for name in ("assert_error", "assert_warning"):
                if hasattr(module, name):
                    setattr(module, name, globals()[name](getattr(module, name)))

    def pytest_runtest_setup(self, item) -> None:
        journal.reset()
        journal.must_compare = item.originalname in BY_MEANS
        self.write({"test": item.nodeid, "outcome": "started"})

    def pytest_runtest_call(self, item) -> None:
        def stop(*_):
            raise TimeoutError(f"over {self.seconds} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)

    def pytest_runtest_teardown(self, item) -> None:
        signal.alarm(0)

    def pytest_runtest_makereport(self, item, call) -> None:
        signal.alarm(0)
        if call.when == "setup" and call.excinfo is not None:
            self.write({"test": item.nodeid, **self.raised(item, call.excinfo.value)})
        if call.when != "call":
            return
        if call.excinfo is None:
            found = self.quiet(item)
        else:
            found = self.raised(item, call.excinfo.value)
        name = item.originalname
        if found["outcome"] == "failed" and name in BY_MEANS and call.excinfo.errisinstance(AssertionError):
            found = {**judged(), "by_means": BY_MEANS[name]} if journal.comparisons else found
        if found["outcome"] in ("failed", "passed") and name in LEFT_OUT:
            found = {"outcome": "left out", "reason": LEFT_OUT[name]}
        self.write({"test": item.nodeid, **found, "comparisons": journal.comparisons, "notes": journal.notes})

    def quiet(self, item) -> dict[str, Any]:
        if not journal.calls:
            return {
                "outcome": "left out",
                "reason": NO_STAND_IN,
            }
        if journal.expected_error:
            return {"outcome": "passed", "reason": f"refuses as Pyro does: {journal.expected_error}"}
        if journal.accepted:
            why = ACCEPTED.get(item.originalname)
            if why is None:
                return {"outcome": "failed", "reason": f"accepts what Pyro refuses ({journal.accepted})"}
            return {"outcome": "passed", "reason": f"works where Pyro refuses: {why}"}
        return judged()

    def raised(self, item, error: BaseException) -> dict[str, Any]:
        import pytest

        if not journal.calls and not isinstance(error, pytest.skip.Exception):
            return {"outcome": "left out", "reason": NO_STAND_IN}
        if isinstance(error, TimeoutError):
            return {"outcome": "not run", "reason": f"{error}"}
        if isinstance(error, NotAValue):
            return {"outcome": "left out", "reason": f"asks for {error}"}
        if isinstance(error, pytest.fail.Exception) and "DID NOT RAISE" in str(error) and item.originalname in ACCEPTED:
            return judged() | {"note": f"works where Pyro refuses: {ACCEPTED[item.originalname]}"}
        if isinstance(error, GumboError):
            return refused(error)
        if journal.refusal is not None and "pattern did not match" in str(error):
            return refused(journal.refusal)  # the test wants Pyro's words for its own error
        if isinstance(error, pytest.skip.Exception):
            missing = "could not import" in str(error)
            return {"outcome": "not run" if missing else "left out", "reason": one_line(error)}
        if isinstance(error, pytest.xfail.Exception):
            return {"outcome": "left out", "reason": f"expected to fail in Pyro: {one_line(error)}"}
        if item.get_closest_marker("xfail") and not journal.calls:
            return {"outcome": "left out", "reason": "expected to fail in Pyro, and takes nothing from a stand-in"}
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, AssertionError) and any(frame.filename.endswith("engine/programs.py") for frame in frames):
            return {"outcome": "left out", "reason": PLACES}
        where = frames[-1]
        return {
            "outcome": "failed",
            "reason": f"{type(error).__name__}: {one_line(error)} ({Path(where.filename).name}:{where.lineno})",
        }

    def write(self, row: dict[str, Any]) -> None:
        with self.out.open("a") as out:
            out.write(json.dumps(row) + "\n")


def assert_error(original: Callable) -> Callable:
    """In place of the test module's own: SiteELBO refuses in one line, or works (and `ACCEPTED` says why it may)."""

    def check(model, guide, elbo, match=None):
        if not isinstance(elbo, StandIn):
            return original(model, guide, elbo, match=match)
        pyro.clear_param_store()
        try:
            pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-6}), elbo).step()
        except GumboError as error:
            assert "\n" not in str(error)
            journal.expected_error = str(error)
        else:
            journal.accepted = match or "an error"

    return check


def assert_warning(original: Callable) -> Callable:
    """Pyro warns of programs that its ELBO may not mean; SiteELBO is to work or to refuse."""

    def check(model, guide, elbo):
        if not isinstance(elbo, StandIn):
            return original(model, guide, elbo)
        pyro.clear_param_store()
        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-6}), elbo).step()

    return check


def run_tests(tree: Path, file: str, out: Path, seconds: int) -> int:
    import pytest

    os.chdir(tree)
    done = {row["test"] for row in read(out) if "test" in row}
    substitute()
    # Pyro's own settings make every warning an error; ours are meant to be read.
    return pytest.main(
        [file, "-qq", "-p", "no:cacheprovider", "-o", "filterwarnings=ignore", "--tb=no"],
        plugins=[Plugin(out, done, seconds)],
    )


def run_example(tree: Path, command: str, out: Path) -> None:
    name, *arguments = command.split()
    path = tree / "examples" / name
    os.chdir(tempfile.mkdtemp(prefix="strangers-"))
    substitute()
    StandIn.most_calls = ENOUGH
    pyro.__version__ = re.search(r'version_prefix = "([^"]+)"', (tree / "pyro/__init__.py").read_text()).group(1)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    if importlib.util.find_spec("visdom") is None:  # four examples import it, for pictures that are off by default
        sys.modules["visdom"] = types.ModuleType("visdom")
        sys.modules["visdom"].Visdom = None
    journal.reset()
    torch.manual_seed(0)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Enough:
        found = judged()
    except GumboError as error:
        found = refused(error)
    except NotAValue as error:
        found = {"outcome": "left out", "reason": f"asks for {error}"}
    except ModuleNotFoundError as error:
        found = {"outcome": "not run", "reason": f"package {error.name}"}
    except SystemExit as error:
        found = judged() if not error.code else {"outcome": "failed", "reason": f"exits with {error.code}"}
    except Exception as error:
        text = f"{type(error).__name__}: {one_line(error)}"
        offline = re.search(
            r"URLError|HTTPError|ConnectionError|urlopen|resolve host|Error downloading|Max retries", text
        )
        found = (
            {"outcome": "not run", "reason": f"download: {text}"} if offline else {"outcome": "failed", "reason": text}
        )
        if not offline:
            found["traceback"] = traceback.format_exc()[-1500:]
    else:
        found = judged()
    if found["outcome"] == "failed" and name in BROKEN:
        found = {"outcome": "not run", "reason": BROKEN[name]}
    if found["outcome"] == "passed" and not journal.calls:
        found = {"outcome": "left out", "reason": NO_STAND_IN}
    row = {"test": f"examples/{command}", **found, "comparisons": journal.comparisons, "notes": journal.notes}
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


# ---- all of them


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def examples(tree: Path) -> list[str]:
    """The command lines that Pyro tests its examples with on the CPU, read from its own list."""
    for node in ast.parse((tree / "tests/test_examples.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CPU_EXAMPLES":
            items = [item.args[0] if isinstance(item, ast.Call) else item for item in node.value.elts]
            return [" ".join(ast.literal_eval(item).split()) for item in items]
    raise SystemExit(f"{tree}/tests/test_examples.py has no list CPU_EXAMPLES")


def names_an_elbo(tree: Path, command: str) -> bool:
    """Whether an example, or a package of Pyro's that it drives, mentions variational inference at all."""
    text = (tree / "examples" / command.split()[0]).read_text()
    if '"--svi"' in text:
        return "--svi" in command
    return bool(re.search(r"\w_?ELBO|SVI\(", text))


def lend_data(home: Path) -> None:
    """Put the data under GUMBO_DATA where Pyro's examples look for their downloads."""
    source, target = Path(os.environ.get("GUMBO_DATA", "/nonexistent")), home / ".data"
    target.mkdir(parents=True)
    if (source / "jsb_chorales.npz").exists():
        import numpy as np

        arrays, chorales = np.load(source / "jsb_chorales.npz"), {}
        for split in ("train", "valid", "test"):
            lengths = torch.tensor(arrays[f"{split}_lengths"]).long()
            rolls = torch.tensor(np.unpackbits(arrays[split], axis=-1)[..., :88]).float()
            chorales[split] = {
                "sequence_lengths": lengths,
                "sequences": [roll[:length].clone() for roll, length in zip(rolls, lengths, strict=True)],
            }
        (target / "jsb_chorales.pkl").write_bytes(pickle.dumps(chorales))
    raw = source / "MNIST" / "raw"
    if (raw / "t10k-images-idx3-ubyte.gz").exists():
        folder = target / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for kind, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
            data = gzip.decompress((raw / f"t10k-{kind}.gz").read_bytes())
            (folder / f"t10k-{kind}").write_bytes(data)
            # The examples want 60,000 training digits: the 10,000 that are here, six times.
            count = (60_000).to_bytes(4, "big")
            (folder / f"train-{kind}").write_bytes(data[:4] + count + data[8:header] + data[header:] * 6)


def spawn(arguments: list[str], seconds: int, home: Path) -> tuple[int | None, str]:
    environment = {**os.environ, "HOME": str(home), "CI": "1", "MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as child:
        try:
            said, _ = child.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            said, _ = child.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, said.decode(errors="replace")
        return child.returncode, said.decode(errors="replace")


def settle(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last word on each test; what only started died with its process."""
    last: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["outcome"] != "started" or row["test"] not in last:
            last[row["test"]] = row
    return last


def run_all(tree: Path, only: str, out: Path, seconds: int, resume: bool) -> dict[str, dict[str, Any]]:
    log = out.with_suffix(".jsonl")
    if not resume:
        log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="strangers-") as folder:
        home = Path(folder)
        lend_data(home)
        for file in TESTS:
            if not re.search(only, file):
                continue
            for _ in range(20):  # a process that dies is started again behind the test that killed it
                before = len(read(log))
                status, said = spawn([str(tree), "--child-tests", file, "--out", str(log)], 3600, home)
                if status in (0, 1) or len(read(log)) == before:
                    break
                stuck = [row["test"] for row in settle(read(log)).values() if row["outcome"] == "started"]
                for test in stuck:
                    row = {"test": test, "outcome": "failed", "reason": f"the process died (status {status})"}
                    with log.open("a") as file_:
                        file_.write(json.dumps(row) + "\n")
            print(file, collections.Counter(r["outcome"] for r in settle(read(log)).values()), flush=True)
            if status not in (0, 1):
                print(said[-2000:], flush=True)
        met: collections.Counter[str] = collections.Counter()
        turn = {}  # every file once before any file a second time
        for command in examples(tree):
            met[command.split()[0]] += 1
            turn[command] = met[command.split()[0]]
        for command in sorted(turn, key=turn.get):
            if not re.search(only, f"examples/{command}") or not names_an_elbo(tree, command):
                continue
            if f"examples/{command}" in settle(read(log)):
                continue
            status, said = spawn([str(tree), "--child-example", command, "--out", str(log)], seconds, home)
            found = settle(read(log)).get(f"examples/{command}")
            if found is None:
                reason = f"over {seconds} s" if status is None else f"status {status}: {' '.join(said[-300:].split())}"
                row = {
                    "test": f"examples/{command}",
                    "outcome": "not run" if status is None else "failed",
                    "reason": reason,
                }
                with log.open("a") as file_:
                    file_.write(json.dumps(row) + "\n")
            print(command, settle(read(log))[f"examples/{command}"]["outcome"], flush=True)
    return settle(read(log))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results for people: counts, then each reason once with how many programs it holds for."""
    groups = sorted({name.split("::")[0] if "::" in name else "examples" for name in rows})
    lines = [
        "# Pyro's own tests and examples under SiteELBO",
        "",
        f"`python benchmarks/strangers.py PYRO_SOURCE_TREE`; pyro {pyro.__version__}, torch {torch.__version__}.",
        "",
        "| | " + " | ".join(OUTCOMES) + " |",
        "| --- |" + " ---: |" * len(OUTCOMES),
    ]
    for group in groups:
        mine = [row for name, row in rows.items() if (name.split("::")[0] if "::" in name else "examples") == group]
        counts = collections.Counter(row["outcome"] for row in mine)
        lines.append(f"| {group} | " + " | ".join(str(counts[outcome]) for outcome in OUTCOMES) + " |")
    compared = [c for row in rows.values() for c in row.get("comparisons", [])]
    both = [c for c in compared if "z_loss" in c]
    largest = max((max(c["z_loss"], c["z_gradient"] or 0) for c in both if not c.get("differs")), default=0)
    lines += [
        "",
        f"Losses and gradients were compared with the stock ELBO on {len(both)} programs (largest |z| {largest:.1f},"
        f" limit {LIMIT:.0f}); on {len(compared) - len(both)} the stock ELBO raises.",
        "",
        "## Refused",
        "",
        "| rule | what | programs | such as |",
        "| ---: | --- | ---: | --- |",
    ]
    reasons = collections.defaultdict(list)
    for name, row in rows.items():
        if row["outcome"] == "refused":
            reasons[row["rule"], row["what"]].append((name, row["reason"]))
    for (rule, what), found in sorted(reasons.items()):
        such = found[0][1].replace("|", "\\|")
        lines.append(f"| {rule} | {what} | {len(found)} | {such} |")
    for outcome in ("passed", "not run", "left out", "failed"):
        kept = collections.defaultdict(list)
        for name, row in rows.items():
            reason = row.get("by_means") or row.get("reason", "")
            if row["outcome"] == outcome and reason:
                reason = "refuses in one line, as Pyro does" if reason.startswith("refuses as Pyro") else reason
                kept[reason.replace("|", "\\|")].append(name)
        if not kept:
            continue
        title = "Passed, with a remark" if outcome == "passed" else outcome.capitalize()
        lines += ["", f"## {title}", "", "| reason | programs | such as |", "| --- | ---: | --- |"]
        lines += [f"| {reason} | {len(names)} | {names[0].split('/')[-1]} |" for reason, names in sorted(kept.items())]
    return "\n".join(lines) + "\n"


def short(rows: dict) -> dict[str, dict]:
    """The rows by file, without what names and reasons say, and the number of comparisons in place of these."""
    found: dict[str, dict] = {}
    for name, row in rows.items():
        kept = {key: value for key, value in row.items() if key not in ("test", "comparisons", "what") and value != []}
        if row.get("comparisons"):
            kept["compared"] = len(row["comparisons"])
        file, _, test = name.partition("::")
        found.setdefault(file, {})[test] = kept
    return found


def lines(found: dict[str, dict]) -> str:
    """JSON with a line for each test or example."""
    files = []
    for file, tests in sorted(found.items()):
        body = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(tests.items())
        )
        files.append(f"{json.dumps(file)}: {{\n{body}\n}}")
    return "{\n" + ",\n".join(files) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, metavar="PYRO_SOURCE_TREE")
    parser.add_argument("--only", default="", help="a regular expression on test files and examples")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results' path without its suffix")
    parser.add_argument("--timeout", type=int, default=300, help="seconds an example may take")
    parser.add_argument("--resume", action="store_true", help="keep the results that stand in OUT.jsonl")
    parser.add_argument("--child-tests", help=argparse.SUPPRESS)
    parser.add_argument("--child-example", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tree = options.tree.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child that runs is ended too
    if not (tree / TESTS[0]).exists():
        raise SystemExit(f"{tree} holds no {TESTS[0]}: give a checkout of Pyro's repository")
    if options.child_tests:
        return run_tests(tree, options.child_tests, options.out, 120)
    if options.child_example:
        run_example(tree, options.child_example, options.out)
        return 0
    rows = run_all(tree, options.only, options.out.resolve(), options.timeout, options.resume)
    options.out.with_suffix(".json").write_text(lines(short(rows)))
    options.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))
    return 1 if any(row["outcome"] == "failed" for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

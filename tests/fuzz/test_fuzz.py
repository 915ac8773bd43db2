"""Whatever is put in: an answer, or one line. Never a traceback, and nothing accepted that cannot be meant."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import warnings
from numbers import Integral, Real

import numpy as np
import pyro
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gumbo.errors import BadInput, GumboError
from gumbo.experiments import cli, compare, train
from gumbo.experiments import data as data_sets
from gumbo.experiments._runs import RunFolder
from gumbo.guides import NormalGuide, fitting, guides
from gumbo.inference import SiteELBO, audit, diagnose, estimators, evaluate, fit, make_loss, parse_schedule, to_arviz
from gumbo.inference.training.checkpoints import load_checkpoint, save_checkpoint
from gumbo.inference.training.schedules import schedules
from gumbo.models import GaussianVAE, models

SHAPE = (1, 4, 4)
SMALL = {"hidden": (3,), "latent_dim": 2, "num_latents": 2, "num_classes": 3, "layers": (3, 2), "latent_dims": (3, 2)}
SMALL |= {"num_components": 2, "level_hidden": 3, "prior_hidden": 3, "channels": (2,), "flow_hidden": (3,)}


class Thing:
    def __repr__(self):
        return "<a thing\nof two lines>"


NUMBERS = [True, False, math.nan, math.inf, -math.inf, 0, 1, 2, 3, -1, 0.5, 1.5, -0.5, 2**31, 2**63, 2**70, -(2**63)]
NUMBERS += [np.float32(0.5), np.int64(2), np.float64("nan"), np.bool_(True), torch.tensor(2), torch.tensor(math.nan)]
TEXTS = [
    "",
    "abc",
    "relu",
    "1",
    "nan",
    "0.5",
    "normal",
    "pathwise",
    "os.system",
    "a.b",
    ":",
    "..",
    "ü",
    "a\0b",
    "x" * 99,
]
LISTS = [(), [], [0], [2], [2, 3], (3,), [-1], [True], [math.nan], ["a"], [[3]], [None], {1}, np.array([2, 3])]
THINGS = [None, b"x", {}, {"a": 1}, {"z": "pathwise"}, {1: 2}, Thing(), Thing, int, len, torch.zeros(2), 1j]
JUNK = st.one_of(*(st.sampled_from(pool) for pool in (NUMBERS, TEXTS, LISTS, THINGS)))


def share(part: float):
    """So much of all cases."""
    return settings(max_examples=max(1, round(settings.default.max_examples * part)))


@contextlib.contextmanager
def one_line():
    """A refusal in one line of gumbo's own, or none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd call may be warned of as well
        try:
            yield
        except GumboError as error:
            assert str(error) and "\n" not in str(error), repr(str(error))


def can_be_meant(value, default) -> bool:
    """Whether a value is of the kind of the default beside it, and a number that anybody would write there."""
    if isinstance(default, bool):
        return isinstance(value, (bool, np.bool_))
    if isinstance(default, int):
        return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < 2**31
    if isinstance(default, float):
        return callable(value) or (isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value))
    if isinstance(default, str):
        return isinstance(value, str) or callable(value)
    if isinstance(default, tuple):
        listed = isinstance(value, (list, tuple, torch.Size))
        return value is None or (listed and all(can_be_meant(one, 1) and one > 0 for one in value))
    return True


def options_of(make) -> dict[str, object]:
    """The options of a constructor with their defaults."""
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def some_options(draw, make, leave_out: tuple[str, ...] = ()) -> dict[str, object]:
    """Up to three options of a constructor with odd values, the others small."""
    known = options_of(make)
    names = [name for name in known if name not in leave_out]
    odd = draw(st.dictionaries(st.sampled_from([*names, "nothing"]), JUNK, min_size=1, max_size=3)) if names else {}
    return {name: value for name, value in SMALL.items() if name in names} | odd


def accepted(make, given: dict[str, object]) -> None:
    known = options_of(make)
    for name, value in given.items():
        assert name in known, f"{make} took {name}"
        assert can_be_meant(value, known[name]), f"{make} took {name}={value!r}"


@share(0.2)
@given(st.data())
def test_models(data):
    name = data.draw(st.sampled_from(sorted(models)))
    make = models[name]
    options = some_options(data.draw, make, ("data_shape",))
    shape = data.draw(st.one_of(st.just(SHAPE), JUNK), label="data_shape")
    with one_line():
        model = make(shape, **options)
        accepted(make, options)
        draws = model.example(2)
        assert all(torch.isfinite(value).all() for value in draws.values())


@pytest.fixture(scope="module")
def small_models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = [cls(SHAPE, **cls.variants[0]) for cls in models.values() if "data_shape" in options_of(cls)]
        return [model for model in made if model.latents]


@share(0.15)
@given(data=st.data())
def test_guides(small_models, data):
    model = data.draw(st.sampled_from(small_models))
    name = data.draw(st.sampled_from(fitting(model)))
    make = guides[name]
    options = some_options(data.draw, make, ("model",))
    with one_line():
        make(model, **options)
        accepted(make, options)


@share(0.15)
@given(st.data())
def test_estimators_and_schedules(data):
    kinds = [cls for cls in vars(estimators).values() if isinstance(cls, type) and cls.__name__ in estimators.__all__]
    kinds = [cls for cls in kinds if cls.__name__ not in ("Draw", "Estimator", "SiteView", "Baseline")]
    make = data.draw(st.sampled_from([*kinds, *(schedules[name] for name in schedules)]))
    options = some_options(data.draw, make)
    missing = [name for name, default in options_of(make).items() if default is inspect.Parameter.empty]
    options = dict.fromkeys(missing, 1) | options
    with one_line():
        made = make(**options)
        accepted(make, options)
        assert repr(made)


@share(0.1)
@given(st.data())
def test_losses(data):
    known = ["estimators", "objective", "num_particles", "kl_weight", "plates", "max_plate_nesting"]
    known += ["vectorize_particles"]
    options = data.draw(st.dictionaries(st.sampled_from(known), JUNK, min_size=1, max_size=2))
    word = options.pop("estimators", data.draw(st.sampled_from(["rloo", "pathwise", "default"])))
    with one_line():
        SiteELBO(word, **options)
        accepted(SiteELBO, options)
    with one_line():
        make_loss(data.draw(st.sampled_from(["trace", "rloo", word])), num_particles=options.get("num_particles"))
    with one_line():
        texts = st.one_of(st.text(max_size=12), st.sampled_from(["linear(nan)", "cosine(1e999)", "linear(1, 2, 3, 4)"]))
        parse_schedule(data.draw(st.one_of(JUNK, texts)))


@pytest.fixture(scope="module")
def pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GaussianVAE((1, 2, 2), latent_dim=1, hidden=(2,))
        return model, NormalGuide(model), torch.bernoulli(torch.full((6, 1, 2, 2), 0.5))


NOT_DATA = [torch.zeros(0, 1, 2, 2), torch.zeros(6), torch.full((6, 1, 2, 2), math.nan)]
NOT_DATA += [torch.zeros(6, 1, 2, 2).double()]
API = {
    fit: ["epochs", "batch_size", "lr", "clip_norm", "clip_value", "optimizer", "loss", "seed", "patience", "valid"],
    evaluate: ["num_samples", "seed", "batch_size"],
    to_arviz: ["num_samples", "seed", "num_chains", "thin", "coords", "dims"],
    audit: ["num_samples", "seed", "num_particles", "alpha", "burn_in", "estimators", "kl_weight", "objective"],
    diagnose: [
        *("num_samples", "num_data", "num_simulations", "num_local_samples", "batch_size", "data_plates"),
        *("refine_steps", "num_refits", "calibration_refits", "refit_steps", "refit", "seed"),
    ],
}
QUICK = {
    fit: {"epochs": 1, "batch_size": 3, "progress": False},
    evaluate: {"num_samples": 2},
    to_arviz: {"num_samples": 2},
    audit: {"num_samples": 10, "estimators": ["pathwise"], "burn_in": 0},
    diagnose: {"num_samples": 100, "num_simulations": 20, "refine_steps": 1, "refit_steps": 1, "progress": False},
}
COUNTS = ("epochs", "batch_size", "seed", "patience", "num_samples", "num_particles", "num_chains", "num_data")
COUNTS += ("num_simulations", "num_local_samples", "refine_steps", "num_refits", "calibration_refits", "refit_steps")


@share(0.12)
@given(data=st.data())
def test_calls(pair, data):
    model, guide, x = pair
    function = data.draw(st.sampled_from(list(API)))
    names = [name for name in API[function] if name in options_of(function)]
    odd = data.draw(st.dictionaries(st.sampled_from(names), JUNK, max_size=2))
    x = data.draw(st.one_of(st.just(x), st.just(x), JUNK, st.sampled_from(NOT_DATA)))
    with one_line(), pyro.get_param_store().scope():
        function(model, guide, x, **QUICK[function] | odd)
        for name, value in odd.items():
            if name in COUNTS and value is not None:
                assert can_be_meant(value, 1) or name == "seed", f"{function.__name__} took {name}={value!r}"
            if name in ("lr", "clip_norm", "clip_value", "alpha", "kl_weight") and value is not None:
                assert can_be_meant(value, 1.0), f"{function.__name__} took {name}={value!r}"


# --- the command line -------------------------------------------------------------------------------------------------

WORDS = [
    "",
    "nan",
    "inf",
    "-1",
    "0",
    "1",
    "2.5",
    "true",
    "null",
    "abc",
    "[0]",
    "[3]",
    "{",
    "{a: 1}",
    "os.system",
    "9" * 30,
]
WORDS += ["9" * 30, "1e400", "cpu", "cuda:7", "meta", "mps", "../../x", "builtins.print", "torch.nn.Linear", "a\0b"]
VALUES = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
SETTINGS = {
    "train": [*options_of(train.Train), "model_options.latent_dim", "model_options.hidden", "guide_options.hidden"],
    "compare": list(options_of(compare.Compare)),
    "audit": ["data", "args", "num_samples", "alpha", "estimators", "particles", "objective", "kl_weight"],
    "evaluate": ["split", "importance_samples", "seed", "best"],
    "inspect": ["split", "num_data", "num_samples"],
    "system": ["data", "seed", "epochs"],
    "list": ["json", "nothing"],
}
FIRST = {"audit": ["gaussian-vae", "normal"], "evaluate": ["no-run"], "inspect": ["no-run"], "system": ["warm-up"]}


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A folder to stand in, and commands that stop where they would begin to compute."""
    folder = tmp_path_factory.mktemp("fuzz")

    def stop(*args, **kwargs):
        raise BadInput("reached")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(RunFolder, "create", stop)
        patch.setattr("gumbo.experiments.listing.catalogue", stop)
        yield folder


def command(*argv: str) -> None:
    """Run it: it ends by itself or in one line on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pyro.get_param_store().scope():
        try:
            cli.main(list(argv))
        except SystemExit as stop:
            said = [line for line in err.getvalue().splitlines() if "warning: " not in line]
            assert stop.code in (0, None) or (stop.code in (1, 2) and len(said) == 1), err.getvalue()


@share(0.12)
@given(data=st.data())
def test_commands(still, data):
    verb = data.draw(st.sampled_from(sorted(SETTINGS)))
    odd = data.draw(st.dictionaries(st.sampled_from(SETTINGS[verb]), VALUES, min_size=1, max_size=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command(verb, *FIRST.get(verb, []), *(f"--{name}={value}" for name, value in odd.items()))


PLAIN = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=5))
TREES = st.recursive(
    PLAIN, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=4), one, max_size=3)
)
NAMES = st.sampled_from([*options_of(train.Train), "experiment", "nothing"])
TABLES = st.dictionaries(NAMES, TREES, max_size=4)
FILES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(str.encode),
    TABLES.map(lambda found: yaml.safe_dump(found).encode()),
    TABLES.map(lambda found: yaml.safe_dump({"experiment": "train"} | found).encode()),
    st.sampled_from([b"a: &a [1]\nb: *a\n", b"[" * 5000, b"{a: " * 3000, b"!!python/object/apply:os.system [ls]"]),
)


@share(0.06)
@given(content=FILES, verb=st.sampled_from(["config", "resume", "evaluate"]))
def test_settings_files(still, content, verb):
    (still / "run").mkdir(exist_ok=True)
    (still / "run" / "config.yaml").write_bytes(content)
    argv = {"config": ["train", "--config", "run/config.yaml"], "resume": ["train", "--resume", "run"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command(*argv.get(verb, ["evaluate", "run"]), *(["--device=meta"] if verb == "resume" else []))


# --- files ------------------------------------------------------------------------------------------------------------


def spoilt(draw, content: bytes) -> bytes:
    """The content with a few bytes changed, cut out or put in."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(made) - 1)))
        new = draw(st.binary(max_size=4))
        made[place : place + draw(st.sampled_from([0, len(new), 1, 50]))] = new
    return bytes(made)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    save_checkpoint(path, {"module": {"w": torch.arange(6.0)}, "numbers": [1, 2.5, None, "x", (1, 2)]})
    return path, path.read_bytes()


@share(0.06)
@given(data=st.data(), reseal=st.booleans())
def test_checkpoints(checkpoint, data, reseal):
    import hashlib

    path, content = checkpoint
    size = 64 + len(b"gumbo checkpoint sha256 ")
    if reseal:
        body = spoilt(data.draw, content[:-size])
        path.write_bytes(body + b"gumbo checkpoint sha256 " + hashlib.sha256(body).hexdigest().encode())
    else:
        path.write_bytes(spoilt(data.draw, content))
    with one_line():
        assert isinstance(load_checkpoint(path), dict)


@share(0.04)
@given(data=st.data(), kind=st.sampled_from(["idx", "idx.gz", "npz"]))
def test_data_files(tmp_path_factory, data, kind):
    import gzip

    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    images = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 2, *range(12)])
    for old in (*raw.iterdir(), *folder.glob("*.npz")):
        old.unlink()
    (raw / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]))
    if kind == "npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, test=np.arange(196, dtype=np.uint8).reshape(2, 98))
        (folder / "binarized_mnist.npz").write_bytes(spoilt(data.draw, buffer.getvalue()))
    elif kind == "idx":
        (raw / "t10k-images-idx3-ubyte").write_bytes(spoilt(data.draw, images))
    else:
        (raw / "t10k-images-idx3-ubyte.gz").write_bytes(spoilt(data.draw, gzip.compress(images)))
    with one_line():
        name = "binarized-mnist" if kind == "npz" else "mnist"
        found = data_sets.load(name, splits="test", root=folder)
        assert ((found.test >= 0) & (found.test <= 1)).all() and len(found.test)

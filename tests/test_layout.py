"""The rooms of the house: which may import which, and how; read from the source, so that nothing has to be run."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up: a room may import those before it.
ROOMS = {
    "models": "gumbo.models",
    "guides": "gumbo.guides",
    "inference": "gumbo.inference",
    **{
        f"inference/{wing}": f"gumbo.inference.{wing.replace('/', '.')}"
        for wing in (
            "estimators",
            "engine",
            "objectives",
            "training",
            "training/compile",
            "auditing",
            "posterior",
            "diagnosis",
        )
    },
    "experiments": "gumbo.experiments",
}
INFERENCE = tuple(room for room in ROOMS if room.startswith("inference"))
MAY_IMPORT = {
    "models": {"models"},
    "guides": {"models", "guides"},
    **dict.fromkeys(INFERENCE, {"models", "guides", "inference"}),
    "experiments": {"models", "guides", "inference", "experiments"},
}
COMMON = {
    "arrays",
    "changes",
    "console",
    "errors",
    "files",
    "launcher",
    "options",
    "pictures",
    "registry",
    "tables",
    "_version",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))


def by_path(paths: list[Path]) -> dict[str, object]:
    """Arguments of `parametrize` that name each test after the file."""
    return {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """(absolute name of what is imported, level) for each import; level 0 is an absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import models` and `from gumbo import models` name a room by the alias, not by the module.
            by_alias = module == "gumbo" or node.module is None
            yield from ((f"{module}.{alias.name}" if by_alias else module, node.level) for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def arrow_faults(tree: ast.AST, room: str) -> set[str]:
    """The parts of gumbo that this source imports and its room may not."""
    used = {name.split(".")[1] for name, _ in imports(tree, ROOMS[room]) if name.startswith("gumbo.")}
    return used - MAY_IMPORT[room] - COMMON


@pytest.mark.parametrize("path", **by_path(sources("models", "guides", *INFERENCE)))
def test_arrows_run_one_way(path):
    assert not arrow_faults(parse(path), str(path.parent.relative_to(ROOT)))


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        ("models", "from ..guides import NormalGuide", {"guides"}),
        ("models", "from .. import inference", {"inference"}),
        ("models", "def f():\n    import gumbo.guides", {"guides"}),
        ("guides", "from ..inference.elbo import SiteELBO", {"inference"}),
        ("guides", "from ..models._base import Latent\nfrom ..errors import BadInput", set()),
        ("inference/estimators", "from ...experiments import data", {"experiments"}),
        ("inference/estimators", "from ..elbo import SiteELBO\nfrom ...models import models", set()),
    ],
)
def test_wrong_arrows_are_seen(room, source, fault):
    assert arrow_faults(ast.parse(source), room) == fault


@pytest.mark.parametrize("name", ["__init__", *sorted(COMMON)])
def test_the_face_imports_no_room(name):
    used = {target for target, level in imports(parse(ROOT / "gumbo" / f"{name}.py"), "gumbo") if level}
    assert used <= {f"gumbo.{part}" for part in COMMON} | {"gumbo._version.__version__"}


@pytest.mark.parametrize("path", **by_path(sources("gumbo", "models", "guides", *INFERENCE)))
def test_imports_inside_the_package_are_relative(path):
    assert not [name for name, level in imports(parse(path), "gumbo") if level == 0 and name.split(".")[0] == "gumbo"]


@pytest.mark.parametrize("path", **by_path([*sources("experiments"), *sorted((ROOT / "tests").rglob("*.py"))]))
def test_scripts_and_tests_import_as_a_user_would(path):
    assert not [name for name, level in imports(parse(path), "gumbo.experiments") if level]
    rooms = {room.split("/")[0] for room in ROOMS}
    assert not {name for name, _ in imports(parse(path), "") if name.split(".")[0] in rooms}


def modules_under(root: Path) -> dict[str, Path]:
    """Every module of the package by the name it is imported under."""
    tops = {"gumbo": "gumbo", **{room: ROOMS[room] for room in ROOMS if "/" not in room}}
    found = {}
    for folder, package in tops.items():
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules each module names in an import, wherever in the file the import stands.

    That importing a module runs the ``__init__`` of its folder first is not counted.
    """
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                aliases = {f"{module}.{alias.name}" for alias in node.names}
                targets = (aliases & modules.keys()) or {module}
            else:
                continue
            graph[name] |= (targets & modules.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules each of which reaches all others of its group."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        reached[start] = found
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_no_file_imports_itself_by_way_of_others():
    assert circles(import_graph(modules_under(ROOT))) == []


def test_a_circle_of_imports_is_seen(tmp_path):
    wing = tmp_path / "inference" / "engine"
    wing.mkdir(parents=True)
    (wing / "__init__.py").write_text("")
    (wing / "a.py").write_text("from .b import f\n")
    (wing / "b.py").write_text("def f():\n    from . import c\n")
    (wing / "c.py").write_text("from ...inference.engine.a import f\n")
    (wing / "d.py").write_text("from . import a, b\n")
    names = [f"gumbo.inference.engine.{letter}" for letter in "abc"]
    assert circles(import_graph(modules_under(tmp_path))) == [names]


# Inside inference/: a wing may import itself and those named here. The face stands above engine and estimators.
FACE = {"elbo", "stock"}
WINGS = {
    "estimators": set(),
    "engine": {"estimators"},
    "objectives": {"engine", "estimators"},
    "elbo": {"engine", "estimators", "objectives"},
    "stock": {"elbo"},
    "auditing": {"engine", "estimators", "objectives", *FACE},
    "posterior": {"engine", "estimators", *FACE},
    # `fit` reports the same held-out numbers as `evaluate`.
    "training": {"engine", "estimators", "objectives", "posterior", *FACE},
    "diagnosis": {"engine", "estimators", "posterior", *FACE},
}


def wing_faults(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports from one file of ``inference/`` to another against the arrows between wings."""

    def wing(name: str) -> str:
        return name.split(".")[2] if name.startswith("gumbo.inference.") else ""

    pairs = ((a, b) for a, targets in graph.items() for b in targets if wing(a) and wing(b) and wing(a) != wing(b))
    return {(a, b) for a, b in pairs if wing(b) not in WINGS[wing(a)]}


def test_arrows_between_wings_run_one_way():
    assert wing_faults(import_graph(modules_under(ROOT))) == set()


def test_a_wrong_arrow_between_wings_is_seen():
    graph = {
        "gumbo.inference.engine.programs": {"gumbo.inference.estimators.score"},
        "gumbo.inference.estimators.score": {"gumbo.inference.engine.programs"},
        "gumbo.inference.posterior.evaluation": {"gumbo.inference.training.fitting"},
    }
    assert len(wing_faults(graph)) == 2


PUBLIC = (
    "gumbo",
    "gumbo.errors",
    "gumbo.registry",
    "gumbo.models",
    "gumbo.models.families",
    "gumbo.models.likelihoods",
    "gumbo.models.priors",
    "gumbo.guides",
    "gumbo.inference",
    "gumbo.inference.estimators",
    "gumbo.inference.objectives",
    "gumbo.experiments.data",
    "gumbo.testing",
)


def hidden_names(modules: dict[str, Path]) -> set[str]:
    """Modules that bear the name of a public function, so that one of the two cannot be had by it."""
    functions = {
        name
        for package in PUBLIC
        for name in importlib.import_module(package).__all__
        if inspect.isfunction(getattr(importlib.import_module(package), name))
    }
    scripts = ROOMS["experiments"]  # a script bears the name of its verb
    return {name for name in modules if name.rpartition(".")[2] in functions and not name.startswith(scripts)}


def test_no_module_bears_the_name_of_a_public_function():
    assert hidden_names(modules_under(ROOT)) == set()


def test_a_module_named_like_a_function_is_seen():
    assert hidden_names({"gumbo.inference.audit": ROOT, "gumbo.inference.auditing": ROOT}) == {"gumbo.inference.audit"}


def test_the_architecture_names_every_file_of_the_face():
    page = (ROOT / "docs" / "architecture.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| `gumbo/` |")]
    left = {"__init__.py", "__main__.py", "_version.py"}
    assert set(re.findall(r"`(\w+\.py)`", line)) == {path.name for path in (ROOT / "gumbo").glob("*.py")} - left


def test_the_architecture_names_every_file_of_every_wing():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room in INFERENCE:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{room}/` |") and ".py`" in line]
        named = set(re.findall(r"`(\w+\.py)`", line))
        assert named == {path.name for path in (ROOT / room).glob("*.py")} - {"__init__.py"}, room


def registrations(tree: ast.AST, registry: str) -> list[str]:
    """The names given to `registry.register("name")` in a source."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return [
        call.args[0].value
        for call in calls
        if call.func.attr == "register"
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == registry
        and call.args
        and isinstance(call.args[0], ast.Constant)
    ]


@pytest.mark.parametrize("room", ["models", "guides", "inference/estimators"])
def test_every_registered_class_is_imported_by_its_folder(room):
    package, word = ROOMS[room], room.split("/")[-1]
    registry = getattr(importlib.import_module(package), word)
    imported = {
        name.rpartition(".")[2] for name, level in imports(parse(ROOT / room / "__init__.py"), package) if level == 1
    }
    declared = {path.stem: registrations(parse(path), word) for path in sources(room)}
    assert any(declared.values()), f"nothing in {room} registers anything"
    for stem, names in declared.items():
        if names and stem not in ("_base", "__init__"):
            assert stem in imported, f"{room}/__init__.py does not import {stem}"
        for name in names:
            assert name in registry
    assert set(registry) == {name for names in declared.values() for name in names}


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


# A path under somebody's home or a shared mount: it means something on one machine only.
FOREIGN_PATH = re.compile(r"(?<![\w./~$}>*-])/(?:home|root|Users|work|mnt|srv)/[\w.]")


def foreign_paths(text: str) -> list[str]:
    own = (f"{ROOT}/", f"{Path.home()}/")
    return [line for line in text.splitlines() if FOREIGN_PATH.search(line) or any(path in line for path in own)]


def test_no_tracked_file_names_a_path_of_one_machine():
    found = {}
    for path in tracked_files():
        try:
            lines = foreign_paths(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a picture
        if lines:
            found[str(path.relative_to(ROOT))] = lines
    assert not found


def test_paths_of_one_machine_are_seen():
    assert foreign_paths("data = '/" + "home/someone/mnist.npz'")
    assert foreign_paths(f"see {ROOT}/notes")
    assert not foreign_paths("https://example.org/home/page and runs/" + "work/now and ~/" + "work/x")


def test_a_large_file_says_which_single_idea_it_holds():
    """Files of more than 350 lines, classes of more than 250 and functions of more than 100 are listed on the page."""
    listed = (ROOT / "docs" / "architecture.md").read_text().split("## Large files")[1].split("\n## ")[0]
    missing = []
    for path in sorted((ROOT / "inference").rglob("*.py")):
        source = path.read_text()
        if len(source.splitlines()) > 350 and path.relative_to(ROOT / "inference").as_posix() not in listed:
            missing.append(path.name)
        for node in ast.walk(ast.parse(source)):
            most = {ast.ClassDef: 250, ast.FunctionDef: 100}.get(type(node), math.inf)
            if getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) > most and f"`{node.name}`" not in listed:
                missing.append(node.name)
    assert not missing


def without_docstring(function: ast.FunctionDef) -> int:
    """The lines of a function, its signature included."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_functions_are_short_beside_their_documentation():
    """As docs/architecture.md says: public ones of more than 100 lines have at most 60 without it, fit excepted."""
    functions = [
        node
        for path in sorted((ROOT / "inference").rglob("*.py"))
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef)
    ]
    assert [node.name for node in functions if without_docstring(node) > 100] == ["fit"]
    long = {node.name: without_docstring(node) for node in functions if node.end_lineno - node.lineno > 100}
    assert max(lines for name, lines in long.items() if name != "fit") <= 60, long


def of_the_locale(tree: ast.AST) -> list[int]:
    """Lines that read or write a text in the encoding of the locale: Path.read_text() and Path.write_text(text)."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    bare = {"read_text": 0, "write_text": 1}  # arguments without an encoding
    return [
        call.lineno
        for call in calls
        if len(call.args) == bare.get(call.func.attr) and all(word.arg != "encoding" for word in call.keywords)
    ]


def test_text_is_utf8_in_every_locale():
    found = {path: of_the_locale(parse(path)) for path in sources("gumbo", *ROOMS)}
    assert {str(path.relative_to(ROOT)): lines for path, lines in found.items() if lines} == {}
    assert of_the_locale(ast.parse("path.read_text()\npath.write_text(text)\nrun.write_text(name, text)")) == [1, 2]

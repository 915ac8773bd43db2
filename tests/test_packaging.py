"""What is installed, what an import costs, and that no experiment script is forgotten."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import gumbo
from gumbo.experiments import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"gumbo": "gumbo"} | {
    f"gumbo/{path.parent.relative_to(ROOT)}": str(path.parent.relative_to(ROOT))
    for room in ("models", "guides", "inference", "experiments")
    for path in (ROOT / room).rglob("__init__.py")
}
HEAVY = ("arviz", "matplotlib", "zuko", "sklearn", "rich", "jsonargparse", "torchvision", "scipy", "xarray", "pandas")


def setuptools_builds_wheels() -> bool:
    """Since 70.1 setuptools needs no other package to build a wheel; a fresh virtual environment has none at all."""
    try:
        return tuple(int(part) for part in version("setuptools").split(".")[:2]) >= (70, 1)
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, so that no `build/` folder is left in it or taken from it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree, out = folder / "tree", folder / "out"
    tree.mkdir()
    junk = shutil.ignore_patterns("__pycache__")
    for name in ("gumbo", "models", "guides", "inference", "experiments", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=junk)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    isolation = ["--no-isolation"] if setuptools_builds_wheels() else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(tree)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if done.returncode and not isolation and "No matching distribution found" in said:
        pytest.skip("building a wheel needs setuptools, which is neither installed nor to be had from an index")
    assert done.returncode == 0, said
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def members(wheel) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_packages_and_nothing_else(members):
    assert {str(Path(name).parent) for name in members if name.endswith(".py")} == set(PACKAGES)
    assert {name.split("/")[0] for name in members} == {"gumbo"}
    strays = {name for name in members if not name.endswith(".py")}
    data = ("gumbo/experiments/configs/", "gumbo/experiments/reproduction/posteriordb")
    assert {name for name in strays if not name.startswith(data)} == {"gumbo/py.typed"}
    assert not any(Path(name).name in ("setup.py", "conftest.py") or "/tests/" in name for name in members)


def test_wheel_holds_every_module_and_configuration(members):
    modules = {
        f"{package}/{path.name}" for package, folder in PACKAGES.items() for path in (ROOT / folder).glob("*.py")
    }
    configs = {f"gumbo/experiments/configs/{path.name}" for path in (ROOT / "experiments/configs").glob("*.yaml")}
    references = {f"gumbo/experiments/reproduction/posteriordb{end}" for end in (".json", "-licence.txt")}
    assert modules | configs | references | {"gumbo/py.typed"} == members


def test_wheel_is_enough_to_import(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import gumbo, gumbo.models, gumbo.guides, gumbo.inference.estimators as e; print(gumbo.__file__, e.__file__)"
    )
    done = python(code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    for found in done.split():
        assert Path(found).is_relative_to(tmp_path)


def python(code: str, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_after(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after a statement."""
    loaded = json.loads(python(f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"))
    return set(HEAVY) & {name.split(".")[0] for name in loaded}


@pytest.fixture(scope="module")
def loaded_by_pyro() -> set[str]:
    """What Pyro drags in by itself is not ours to answer for."""
    return heavy_after("import torch, pyro, pyro.nn, pyro.infer, pyro.infer.autoguide, pyro.optim, pyro.poutine")


@pytest.mark.parametrize("name", ["gumbo", "gumbo.inference", "gumbo.inference.estimators", "gumbo.guides"])
def test_import_loads_torch_and_pyro_only(name, loaded_by_pyro):
    assert heavy_after(f"import {name}") <= loaded_by_pyro


def test_heavy_imports_are_seen():
    assert "rich" in heavy_after("import rich")


def test_bare_import_is_cheap():
    assert "torch" not in python("import gumbo, sys; print([name for name in sys.modules if '.' not in name])")


def test_version_is_the_distribution_s():
    assert version("gumbo-ppl") == importlib.import_module("gumbo").__version__


def scripts() -> dict[str, Path]:
    """The experiment scripts: files that define `main`, the face over them left out."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        if "main" in functions and path.stem != "cli":
            found[path.stem] = path
    return found


def test_no_script_shadows_the_standard_library():
    """`python experiments/x.py` puts the folder first on the path: an `inspect.py` there would break every sibling."""
    assert not {path.stem for path in (ROOT / "experiments").glob("*.py")} & set(sys.stdlib_module_names)


def test_every_script_is_a_verb_and_every_verb_a_script():
    assert {verb.module for verb in cli.VERBS.values()} == set(scripts())


def mentions(tree: ast.AST, stem: str) -> bool:
    """Whether a test's source imports the module `gumbo.experiments.<stem>` or names the file `<stem>.py`."""
    module = f"gumbo.experiments.{stem}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name == module for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom):
            names = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            if module in names:
                return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and f"{stem}.py" in node.value.split("/"):
            return True
    return False


def test_every_script_is_exercised():
    here = Path(__file__).name
    tests = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py") if path.name != here]
    assert not [stem for stem in [*scripts(), "cli"] if not any(mentions(tree, stem) for tree in tests)]


def test_a_script_without_a_test_is_seen():
    tree = ast.parse("from gumbo.experiments import train\nrun('experiments/compare.py')")
    assert mentions(tree, "train") and mentions(tree, "compare") and not mentions(tree, "evaluate")


def test_the_citation_names_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["title"].startswith("gumbo: ")
    assert found["version"] == gumbo.__version__ and found["license"] == "Apache-2.0"
    assert {"message", "authors", "type"} <= found.keys()

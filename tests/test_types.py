"""The type check sees what a user's own would: an error that is planted, and none that is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PLANTED = """

def planted() -> int:
    from .models import GaussianVAE

    return GaussianVAE((1, 2, 2)).data_shape
"""


@pytest.mark.slow
def test_a_planted_type_error_fails_the_check(tmp_path):
    pytest.importorskip("pyright")
    junk = shutil.ignore_patterns("__pycache__", "results")
    for name in ("gumbo", "models", "guides", "inference", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=junk)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    check = [sys.executable, str(ROOT / ".ci" / "typecheck"), str(tmp_path)]
    clean = subprocess.run(check, capture_output=True, text=True, timeout=500)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    with open(tmp_path / "gumbo" / "errors.py", "a") as file:
        file.write(PLANTED)
    planted = subprocess.run(check, capture_output=True, text=True, timeout=500)
    assert planted.returncode == 1
    # Through a relative import of a room: where pyright cannot follow it, it says nothing of the kind.
    assert '"Size" is not assignable to' in planted.stdout and "errors.py" in planted.stdout, planted.stdout

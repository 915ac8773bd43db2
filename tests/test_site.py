"""The documentation site builds without a warning, its tutorials included, and holds what it promises."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("sphinx", "furo", "myst_nb")
SAID = {  # what cells of each tutorial print
    "auto": "local-expectation",
    "counts-and-topics": "perplexity at most",
    "discrete-model": "recommended: enumerate",
    "normal-to-gumbel-softmax": "recommended: enumerate",
    "own-program": "root mean square error",
    "sequences": "16 states: log p(x)",
    "several-processes": "2 processes: valid ELBO",
    "trust": "missed-mass",
}
REFERENCE = ("gumbo.models", "gumbo.guides", "gumbo.inference", "gumbo.inference.estimators", "gumbo.testing")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    # The suite's own backend of matplotlib would leave the notebooks without pictures.
    surroundings = {name: value for name, value in os.environ.items() if name not in ("DOCS_ONLINE", "MPLBACKEND")}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env=surroundings | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_says_where_to_go(site):
    landing = (site / "index.html").read_text(encoding="utf-8")
    assert "audit-bernoulli" in landing and "trace (pathwise)" in landing
    for page in ROOT.glob("docs/**/*.md"):
        if "_build" not in page.parts:
            assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


@pytest.mark.slow
def test_no_page_shows_the_marks_of_a_role(site):
    """The sources under ``_modules`` show their docstrings as they are written."""
    roles = re.compile(r":(?:py:)?(?:attr|class|data|doc|exc|func|math|meth|mod|obj|ref):|\w``|``\w")
    for page in site.glob("**/*.html"):
        if "_modules" not in page.relative_to(site).parts:
            text = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
            assert not (found := roles.search(text)), f"{page.name}: {text[found.start() - 40 : found.end() + 40]}"


@pytest.mark.slow
def test_the_reference_shows_the_parameters_of_a_class(site):
    for page in site.glob("reference/*.html"):
        text = re.sub(r"<[^>]+>|\s", "", page.read_text(encoding="utf-8"))
        unsaid = re.findall(r"class(gumbo\.[\w.]+)\(\*args,\*\*kwargs\)", text)
        assert set(unsaid) <= {"gumbo.inference.estimators.SiteState"}, page.name  # that of torch.nn.Module


@pytest.mark.slow
def test_commands_in_tables_break_and_names_do_not(site):
    html = (site / "systems.html").read_text(encoding="utf-8")
    codes = re.findall(r'<code class="([^"]*)">(.*?)</code>', "".join(re.findall(r"<td.*?</td>", html, re.DOTALL)))
    assert len(codes) > 10
    for classes, code in codes:
        assert ("long" in classes.split()) == (len(re.sub(r"<[^>]+>", "", unescape(code))) > 30), code


@pytest.mark.slow
def test_tutorials_ran_in_the_build(site):
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        html = (site / "tutorials" / f"{page.stem}.html").read_text(encoding="utf-8")
        assert SAID[page.stem] in html and "Traceback" not in html
        assert re.search(r'<img[^>]*src="\.\./_images/[0-9a-f]+\.png"', html), f"{page.name} shows no picture"


@pytest.mark.slow
@pytest.mark.parametrize("package", REFERENCE)
def test_the_reference_holds_every_public_function_and_class(site, package):
    module = importlib.import_module(package)
    html = "".join(path.read_text(encoding="utf-8") for path in site.glob("reference/*.html"))
    for name in module.__all__:
        if isinstance(getattr(module, name), type) or type(getattr(module, name)).__name__ == "function":
            assert f'id="{package}.{name}"' in html, name


@pytest.mark.slow
def test_formulas_and_pages_load_nothing_from_elsewhere(site):
    html = (site / "several-processes.html").read_text(encoding="utf-8")
    assert "<math" in html and not re.search(r"<script[^>]*mathjax", html, re.IGNORECASE)
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', html)

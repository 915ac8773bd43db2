"""``report.html`` of each verb in headless Chromium: a silent console, no network, readable on a phone."""

from __future__ import annotations

import pytest
from browser import Browser, program

from gumbo.experiments import cli
from gumbo.experiments._report import MOST_BYTES

pytestmark = pytest.mark.skipif(program() is None, reason="needs Chromium (Debian's package chromium)")

SMALL = "--model gaussian-vae --model_options.hidden=[4] --model_options.latent_dim=2 --guide_options.hidden=[4]"
TRAIN = f"train {SMALL} --epochs=2 --batch_size=400 --importance_samples=2 --folder=train"
COMMANDS = {
    "train": ([TRAIN], "train/report.html"),
    "inspect": (
        [TRAIN, "inspect train --num_data 4 --num_samples 100 --num_simulations 20 --refine_steps 0"],
        "train/report.html",
    ),
    "audit": (
        [
            "audit bernoulli-vae bernoulli --data digits --batch_size 2 --estimators [rloo,score,enumerate] "
            "--num_samples 20 --model_options.num_latents=2 --model_options.hidden=[4] --guide_options.hidden=[4] "
            "--folder=audit"
        ],
        "audit/report.html",
    ),
    "reproduce": (["reproduce toy --quick --cells [0.45/rloo] --folder ."], "toy/report.html"),
    "compare": (
        [
            "compare --quick --families [continuous] --seeds 1 --epochs 1 --warm_up 0 --common_epochs 1 --burn_in 2 "
            "--jobs 1 --gradient_draws 2 --batch_size 400 --importance_samples 2 --hidden [4] --latent_dim 2 "
            "--folder compare"
        ],
        "compare/report.html",
    ),
}
BROKEN = "[...document.images].filter(image => !image.alt || !image.naturalWidth).map(image => image.alt)"
NAMELESS = "document.querySelectorAll('svg:not([aria-label])').length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


SLOW = ("compare", "inspect")


@pytest.mark.parametrize("verb", [pytest.param(v, marks=pytest.mark.slow) if v in SLOW else v for v in COMMANDS])
def test_a_report_is_silent_whole_and_fits_a_phone(verb, browser, tmp_path, monkeypatch, capsys):
    commands, place = COMMANDS[verb]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        cli.main(command.split())
    assert (tmp_path / place).stat().st_size < MOST_BYTES
    for width in (1280, 390):
        for dark in (False, True):
            browser.open(tmp_path / place, width, dark=dark)
            assert browser.logged == []
            assert all(url.startswith(("file:", "data:")) for url in browser.requested)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run(BROKEN) == [] and browser.run(NAMELESS) == 0
            if verb == "audit":  # another picture on a phone, one panel above the other
                shape = browser.run("document.images[0].naturalWidth / document.images[0].naturalHeight")
                assert shape > 1.5 if width > 1000 else shape < 1
            assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark


def test_the_browser_hears_what_a_page_says_and_asks_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://nowhere.invalid/a.png'><script>console.log('heard'); nothing()</script>")
    browser.open(page)
    assert any("heard" in said for said in browser.logged) and any("nothing" in said for said in browser.logged)
    assert "http://nowhere.invalid/a.png" in browser.requested
    assert browser.run(BROKEN) == [""]

"""How many cases: 500 in all, 5,000 with ``--slow``; the same ones every time."""

from hypothesis import HealthCheck, settings


def pytest_configure(config):
    settings.register_profile(
        "fuzz",
        max_examples=5_000 if config.getoption("--slow") else 500,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("fuzz")

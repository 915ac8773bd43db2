"""``python -m gumbo`` and the command ``gumbo``."""

from __future__ import annotations


def main() -> None:
    from .experiments.cli import main as run

    run()


if __name__ == "__main__":
    main()

"""Experiments: one script per experiment, and the command line."""

__all__ = ["data"]  # pyright: ignore[reportUnsupportedDunderAll]  # imported on use

"""Gradient estimators: one file per family."""

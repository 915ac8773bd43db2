"""Experiments: one script per experiment, and the command line."""

"""The rooms stand at the top level of the repository and are imported as parts of ``gumbo``.

Everything else about the distribution is in ``pyproject.toml``; only this map cannot be said there
without naming each folder's parent as well.
"""

from setuptools import setup

setup(
    package_dir={
        "gumbo": "gumbo",
        "gumbo.models": "models",
        "gumbo.guides": "guides",
        "gumbo.inference": "inference",
        "gumbo.inference.estimators": "inference/estimators",
        "gumbo.experiments": "experiments",
    },
    packages=[
        "gumbo",
        "gumbo.models",
        "gumbo.guides",
        "gumbo.inference",
        "gumbo.inference.estimators",
        "gumbo.experiments",
    ],
    package_data={"gumbo": ["py.typed"], "gumbo.experiments": ["configs/*.yaml"]},
)

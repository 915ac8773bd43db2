"""The rooms stand at the top level of the repository and are imported as parts of ``gumbo``.

Everything else about the distribution is in ``pyproject.toml``; only this map cannot be said there
without naming each folder's parent as well.
"""

from setuptools import find_packages, setup

_ROOMS = ("models", "guides", "inference", "experiments")
_PLACES = {"gumbo": "gumbo"}
for _room in _ROOMS:
    _PLACES[f"gumbo.{_room}"] = _room
    for _wing in find_packages(_room):
        _PLACES[f"gumbo.{_room}.{_wing}"] = f"{_room}/{_wing.replace('.', '/')}"

setup(
    package_dir=_PLACES,
    packages=list(_PLACES),
    package_data={
        "gumbo": ["py.typed"],
        "gumbo.experiments": ["configs/*.yaml"],
        "gumbo.experiments.reproduction": ["*.json", "*.txt"],
    },
)

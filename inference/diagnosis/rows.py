"""A subset of the rows, for data so large that all rows take long and add little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import PROGRAM_ERRORS
from ..engine.rows import spaced
from ..engine.scopes import quietly
from ..posterior.alone import changed_alone
from ..posterior.runner import Sweep
from ..posterior.sites import has_rows


def few_rows(sweep: Sweep, num_data: int, options: Mapping[str, Any]) -> tuple[Sweep, tuple, dict]:
    """The same programs on evenly spaced rows, if every latent is local and these rows have the same terms alone."""
    args, kwargs = sweep.args, sweep.kwargs
    plates = [plate for plate in sweep.data_plates if sweep.sizes[plate] > num_data]
    if not plates or sweep.shared or sweep.swept.keys() - {sweep.sliced}:
        return sweep, args, kwargs
    size = sweep.sizes[plates[0]]
    rows = spaced(size, num_data)

    def cut(value):
        return value[rows.to(value.device)] if has_rows(value, size) else value

    fewer = tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
    if not any(has_rows(value, size) for value in (*args, *kwargs.values())):
        return sweep, args, kwargs
    try:
        smaller = Sweep(sweep.model, sweep.guide, *fewer, **options)
        if smaller.sizes.get(plates[0]) != num_data:
            return sweep, args, kwargs
        with quietly(sweep.model, sweep.guide, 0):
            few = (lambda values: smaller.run(1, fixed=values)), rows
            changed = changed_alone(lambda values: sweep.run(1, fixed=values), [few], plates[0])
    except PROGRAM_ERRORS:
        return sweep, args, kwargs
    return (smaller, *fewer) if changed is None else (sweep, args, kwargs)

"""Diagnostics ``shift``, ``width``, ``shape``, ``correlation``: marginals and pairs against those of weighted draws."""

from __future__ import annotations

import math

import numpy as np

from .pairs import GROUPS, PAIRS, compared_pairs
from .report import ALARM, OK, Verdict, three_way
from .shapes import SHARES, shape_differences
from .thresholds import CORRELATION, ENOUGH, PROBABILITY, SHIFT, SURE, WIDTH, allowed, single
from .units import Units

# The dimensions of a block, and the most blocks, evenly spaced.
_TOGETHER = 30
_BLOCKS = 100


def moments(units: Units, weak: tuple[str, str] | None) -> list[Verdict]:
    """Verdicts on shift, width, shape and correlation; ``weak`` says why the weights cannot support an ok.

    Errors are from a jackknife over twenty groups of draws. A difference counts if its probability by chance, over all
    dimensions or pairs of them, is below one in a thousand. Of up to 3,000 dimensions all are compared.
    """
    blocks = _blocks(len(units.names))
    compared = np.concatenate(blocks)
    count, names = len(compared), [units.names[place] for place in compared]
    continuous, binary = ~units.discrete[compared], units.binary[compared]
    some = "" if count == len(units.names) else f"; {count} of {len(units.names)} dimensions are compared"
    telling = units.telling
    if not telling.any() or telling.sum() <= len(units) / 2:
        return [_unknown(units, name, weak) for name in _asked(continuous, ~binary, count)]
    weight = units.log_weight[telling]
    of_blocks = [_of_block(units, one, telling, weight) for one in blocks]
    shift, width = (np.concatenate([found[part] for found, _ in of_blocks], -1) for part in (0, 1))
    errors = [np.concatenate([error[part] for _, error in of_blocks], -1) for part in (0, 1)]
    shown, clear = units.shown[telling][:, compared], units.clear(ENOUGH)[telling]
    verdicts = []

    scale = np.where(binary, PROBABILITY, SHIFT)
    size, alarm, fine = _root_mean_square(shift / scale, errors[0] / scale, 1.0, shown)
    few = _single(shift / scale, errors[0] / scale, 1.0, shown, len(units))
    worst = int(np.argmax(size))
    unit = "in probability" if binary[worst] else "of the posterior's standard deviations"
    verdicts.append(
        _verdict(
            units,
            "shift",
            alarm or bool(few),
            fine and bool(size.max() <= 1.0),
            weak,
            f"the guide's mean is off by {size[worst] * scale[worst]:.2f} {unit} (root mean square) at {names[worst]}, "
            f"limit {scale[worst]}; posterior by importance weights{some}{few}",
            (float(size[worst] * scale[worst]), float(scale[worst])),
            "train longer, or with a smaller learning rate; an amortized guide may need a larger network",
        )
    )
    if continuous.any():
        kept = [part[:, continuous] for part in (width, errors[1], shown)]
        of_values = [name for name, one in zip(names, continuous, strict=True) if one]
        verdicts.append(_width(units, of_values, *kept, clear, weak))
    if not binary.all():
        limit = -math.log(WIDTH)
        off = (size > 1.0) | continuous & (_root_mean_square(width, errors[1], limit, shown)[0] > limit)
        verdicts.append(_shape(units, telling, shown & ~off, blocks, weak))
    if len(units.names) > 1:
        verdicts.append(_correlation(units, blocks, weak))
    return verdicts


def _width(
    units: Units,
    names: list[str],
    width: np.ndarray,
    error: np.ndarray,
    shown: np.ndarray,
    clear: np.ndarray,
    weak: tuple[str, str] | None,
) -> Verdict:
    """The verdict on standard deviations, from their log-ratios ``(units, d)`` at continuous dimensions."""
    from scipy.stats import t

    limit, many = -math.log(WIDTH), shown.sum(0).clip(1)
    mean, noise = (width * shown).sum(0) / many, np.sqrt((error**2 * shown).sum(0)) / many
    fires = (np.abs(mean) > limit) & (np.abs(mean) > t.isf(SURE / 2 / len(names), (GROUPS - 1) * many) * noise)
    # Units too wide and units too narrow cancel in the mean.
    size, uneven, _ = _root_mean_square(width, error, limit, shown)
    # Few effective draws are close together whatever the posterior's width: they cannot show a guide too wide, and a
    # single unit's must be enough.
    few = _single(width, error, limit, shown & clear[:, None], len(units))
    alarm = bool((fires & (mean < 0)).any()) or (bool(fires.any() or few) or uneven) and weak is None
    worst = int(np.argmax(np.abs(mean)))
    value = math.exp(mean[worst])
    text = (
        f"at {names[worst]} the guide's standard deviation is {value:.2f} times the posterior's by importance weights, "
        f"limits {WIDTH} and {1 / WIDTH:.2f}; {int(fires.sum())} of {len(names)} dimensions are outside"
    )
    if size.max() > limit and not fires.any():
        value = math.exp(size.max())
        text += f"; at {names[int(np.argmax(size))]} it is off by a factor of {value:.2f} (root mean square)"
    text += few
    fine = bool((2 * noise < limit).all() and np.abs(mean).max() <= limit and size.max() <= limit)
    mend = "a family with correlations if correlation or khat fires too, else train longer"
    return _verdict(units, "width", alarm, fine, weak, text, (float(value), WIDTH), mend)


def _shape(
    units: Units,
    telling: np.ndarray,
    shown: np.ndarray,
    blocks: list[np.ndarray],
    weak: tuple[str, str] | None,
) -> Verdict:
    """The verdict on the marginals of dimensions with more than two values.

    ``shown`` ``(units, d)`` leaves out masked numbers, and dimensions whose mean or width is off.
    """
    shown = shown[:, ~units.binary[np.concatenate(blocks)]]
    blocks = [block[~units.binary[block]] for block in blocks]
    names = [units.names[place] for place in np.concatenate(blocks)]
    if not shown.any():
        weak = weak or ("mean or width is off in every dimension", "follow the advice of shift and width first")
        return _unknown(units, "shape", weak)
    weight = units.log_weight[telling]
    weight = np.exp(weight - weight.max(-1, keepdims=True))
    values = (units.values[telling][..., block].astype(np.float64) for block in blocks)
    parts = [shape_differences(one, weight, units.discrete[block]) for one, block in zip(values, blocks, strict=True)]
    difference, error = (np.concatenate(sides, 1) / PROBABILITY for sides in zip(*parts, strict=True))
    size, alarm, fine = _root_mean_square(difference, error, 1.0, shown[..., None])
    place, point = np.unravel_index(int(np.argmax(size)), size.shape)
    size = PROBABILITY * size
    explained = "the mean explains" if units.discrete[np.concatenate(blocks)[place]] else "mean and width explain"
    text = (
        f"the probability of {names[place]} below the value where the guide has {SHARES[point]:.1%} is off by "
        f"{size.max():.3f} (root mean square) beyond what {explained}, limit {PROBABILITY}; posterior by importance "
        "weights"
    )
    # Few effective draws have a marginal of few steps, whatever the posterior's.
    alarm, fine = alarm and weak is None, fine and bool(size.max() <= PROBABILITY)
    numbers = float(size.max()), PROBABILITY
    return _verdict(
        units, "shape", alarm, fine, weak, text, numbers, "a family with other marginals: a flow, a mixture"
    )


def _correlation(units: Units, blocks: list[np.ndarray], weak: tuple[str, str] | None) -> Verdict:
    """The verdict on correlations: of all pairs, or of those within blocks and of some dimensions spaced over all."""
    found = compared_pairs(units, blocks)
    size, alarm, fine = _judged(found.count, found.raw, found.noise, CORRELATION)
    worst = int(np.argmax(size))
    pair = " and ".join(units.names[place] for place in (found.one[worst], found.other[worst]))
    text = (
        f"the correlation of {pair} is off by {size[worst]:.2f} (root mean square), limit {CORRELATION}; "
        "posterior by importance weights"
    )
    compared, every = len(np.unique(found.one * len(units.names) + found.other)), math.comb(len(units.names), 2)
    if compared < every:
        text += f"; {compared} of {every} pairs are compared ({_percent(compared / every)})"
        fewer = int(PAIRS / every * 0.9)
        advice = "compare the others yourself, by weighted draws of to_arviz"
        if fewer and units.what == "data":
            advice = f"num_data={fewer} compares all pairs"
        weak = weak or ("nothing is known of the others", advice)
    fine = fine and bool(size.max() <= CORRELATION)
    numbers = float(size[worst]), CORRELATION
    mend = "a guide with correlations: a full covariance, a flow, or one that draws the latents in turn"
    return _verdict(units, "correlation", alarm, fine, weak, text, numbers, mend)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "below 1%"


def _blocks(count: int) -> list[np.ndarray]:
    """Blocks of neighbouring dimensions: all of them, or as many as are compared."""
    starts = np.arange(0, count, _TOGETHER)
    if len(starts) > _BLOCKS:
        starts = starts[np.linspace(0, len(starts) - 1, _BLOCKS).round().astype(int)]
    return [np.arange(start, min(start + _TOGETHER, count)) for start in starts]


def _of_block(units: Units, block: np.ndarray, telling: np.ndarray, weight: np.ndarray) -> tuple[list, list]:
    values = units.values[telling][..., block].astype(np.float64)
    return _jackknife(values, weight, units.binary[block])


def _asked(continuous: np.ndarray, many: np.ndarray, count: int) -> list[str]:
    return [
        "shift",
        *(["width"] if continuous.any() else []),
        *(["shape"] if many.any() else []),
        *(["correlation"] if count > 1 else []),
    ]


def _unknown(units: Units, name: str, weak: tuple[str, str] | None) -> Verdict:
    reason, advice = weak or units.weak or ("the weights are too uneven", "a better guide would give a verdict")
    return Verdict(name, three_way(False, False), f"{units.what}: {reason}", advice=advice)


def _verdict(units: Units, name: str, alarm, fine, weak, text: str, numbers: tuple[float, float], mend: str) -> Verdict:
    word = three_way(alarm, fine and weak is None)
    text = f"{units.what}: {text}"
    if word == OK:
        return Verdict(name, word, text, *numbers, "nothing")
    if word == ALARM:
        return Verdict(name, word, text, *numbers, mend)
    reason, advice = weak or (
        "the noise of the weights is as large as the limit",
        f"num_samples={4 * units.draws} would give a verdict",
    )
    return Verdict(name, word, f"{text}; {reason}", *numbers, advice)


def _root_mean_square(
    difference: np.ndarray, error: np.ndarray, limit: float, shown: np.ndarray
) -> tuple[np.ndarray, bool, bool]:
    """Root mean square of ``shown`` units ``(units, …)`` without noise; if one exceeds the limit; if all are sure."""
    count = shown.sum(0).clip(1)
    raw, noise = ((part**2 * shown).sum(0) / count for part in (difference, error))
    return _judged(count, raw, noise, limit)


def _single(difference: np.ndarray, error: np.ndarray, limit: float, shown: np.ndarray, many: int) -> str:
    """Which of ``many`` units are beyond the limit of single ones, in words; nothing if none is.

    A unit's errors share its weights, so that their mean square counts as one of theirs.
    """
    from scipy.stats import f

    some = shown.any(1)
    if not some.any():
        return ""
    count = shown[some].sum(1)
    raw, noise = ((part[some] ** 2 * shown[some]).sum(1) / count for part in (difference, error))
    most = limit * single(many, count)
    square = raw - noise
    beyond = (square > most**2) & (raw > f.isf(SURE / many, 1, GROUPS - 1) * noise)
    if not beyond.any():
        return ""
    times = np.sqrt(square[beyond].max()) / limit
    return (
        f"; in {int(beyond.sum())} of {many} it is off by up to {times:.1f} times the limit, more than the "
        f"{(most / limit)[beyond].max():.1f} times that one of so many may be"
    )


def _judged(count: np.ndarray, raw: np.ndarray, noise: np.ndarray, limit: float) -> tuple[np.ndarray, bool, bool]:
    """The same by the number of units, and the mean squares over them of differences and of their errors."""
    from scipy.stats import f

    square = (raw - noise).clip(0)
    sure = f.isf(SURE / max(1, raw.size), count, (GROUPS - 1) * count)
    alarm = (square > limit**2) & (raw > sure * noise)
    resolution = np.sqrt(2 * np.sqrt(2 / count) * noise)
    # A few of many pairs may be less certain than the others.
    unclear = int((resolution > limit).sum())
    return np.sqrt(square), bool(alarm.any()), unclear <= allowed(resolution.size)


def _jackknife(values: np.ndarray, log_weight: np.ndarray, binary: np.ndarray) -> tuple[list, list]:
    """Differences between draws and weighted draws, each ``(units, d)``, and their standard errors."""
    values = values - values.mean(1, keepdims=True)
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    edges = np.linspace(0, values.shape[1], GROUPS + 1).astype(int)
    sums = {"q": [], "p": []}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        piece = values[:, start:stop]
        sums["q"].append(_sums(piece, np.ones((len(values), stop - start))))
        sums["p"].append(_sums(piece, weight[:, start:stop]))
    parts = {side: [np.stack(part) for part in zip(*found, strict=True)] for side, found in sums.items()}
    whole = {side: [part.sum(0) for part in found] for side, found in parts.items()}
    whole_q, whole_p = _central(*whole["q"]), _central(*whole["p"])
    found = _differences(whole_q, whole_p, whole_p[1], binary)
    left = []
    for group in range(GROUPS):
        q, p = (_central(*[w - part[group] for w, part in zip(whole[s], parts[s], strict=True)]) for s in ("q", "p"))
        left.append(_differences(q, p, whole_p[1], binary))
    errors = []
    for many in zip(*left, strict=True):
        stacked = np.stack(many)
        errors.append(np.sqrt((GROUPS - 1) / GROUPS * ((stacked - stacked.mean(0)) ** 2).sum(0)))
    return found, errors


def _sums(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weighted = values * weight[..., None]
    return weight.sum(1), weighted.sum(1), (weighted * values).sum(1)


def _central(total: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation from sums over draws."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.nan_to_num(first / total[:, None])
        variance = np.nan_to_num(second / total[:, None]) - mean**2
    return mean, np.sqrt(variance.clip(0))


def _differences(q: tuple, p: tuple, unit: np.ndarray, binary: np.ndarray) -> list[np.ndarray]:
    """Shift in posterior sds ``unit`` (in probability where binary), and log ratio of sds."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(binary, q[0] - p[0], (q[0] - p[0]) / unit)
        width = np.log(q[1] / p[1])
    shift = np.nan_to_num(shift).clip(-1e3, 1e3)
    return [shift, np.nan_to_num(width, posinf=10.0, neginf=-10.0)]

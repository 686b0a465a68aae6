"""Statistics of the scans that a network is trained on, and warnings of a scan that differs from them.

A network answers whatever it is given. The usual mistakes show, though, in a few numbers that do not depend on the
scale of the intensities, which the z-score removes:

* the voxel size of the file. Resampling makes up for smaller voxels, but not for larger ones;
* the share of voxels that are not zero (a scan whose skull or background was not removed, or that was already
  z-scored), and their mean in standard deviations (one that is already centred);
* within the brain, how long the bright tail of each channel is compared with the dark one, and how the channels
  correlate, by ranks. T2 has a bright tail, the fluid, which is dark in the others, so these numbers show whether the
  channels fit better in another order. A scan is compared with itself in another order, which makes this safe: of 20
  real scans in their right order, from three releases and as many institutes, none was taken for another order,
  whichever of the others (220 choices) gave the ranges. Of wrong orders of four channels it finds 87 to 96 %, and all
  that swap T2 with another channel. It can't tell T1 from contrast-enhanced T1, nor, with two channels only, FLAIR from
  either: they differ no more than patients do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np

from pipelines.preparing.store import Store
from pipelines.scans.geometry import voxel_size_mm

MOST_SCANS = 8  # of a store that are measured
NO_BACKGROUND = 0.95  # share of non-zero voxels above which a scan has no background of zero
OCCUPIED_SLACK = 0.2
CONTRAST_SLACK = 2.0
SPACING_FACTOR = 2.0
BRAIN_VOXELS = 50_000  # at most: ranks of more take longer and add nothing
CORRELATION_SLACK = 0.25  # this and the next: as much as patients differ
TAIL_SLACK = 0.5
REORDERED = 4.0  # how much better another order must fit, in squares of the slack
NEARLY_ONE = 0.98  # rank correlation above which two channels are one image; two modalities reach 0.91


def scan_statistics(image_XYZC: np.ndarray, affine: np.ndarray) -> dict[str, list[float]]:
    """The statistics of one scan.

    Args:
        image_XYZC: prepared, not normalised. affine: (4, 4), voxel index to mm, of the file.

    Returns:
        "spacing_mm" along X, Y and Z of RAS; by channel "occupied", the share of non-zero voxels, "contrast", their
        mean over their deviation (0 if there are none, or all are equal), and "tail", the logarithm of how much longer
        the bright tail is than the dark one; "correlation" of the ranks by pair of channels, (0, 1), (0, 2), ...
    """
    occupied, contrast = [], []
    for channel in np.moveaxis(image_XYZC, -1, 0):
        values = channel[channel != 0]
        deviation = float(values.std()) if values.size else 0.0
        occupied.append(values.size / channel.size)
        contrast.append(float(values.mean()) / deviation if deviation > 0 else 0.0)
    brain_NC = _brain(image_XYZC)
    return {
        "spacing_mm": voxel_size_mm(affine),
        "occupied": occupied,
        "contrast": contrast,
        "tail": [_tail(values) for values in brain_NC.T],
        "correlation": _rank_correlations(brain_NC),
    }


def _brain(image_XYZC: np.ndarray) -> np.ndarray:
    """Some voxels (N, C) that in every channel differ from the background, which is the first voxel's value."""
    voxels_NC = image_XYZC.reshape(-1, image_XYZC.shape[-1])
    inside = np.ones(len(voxels_NC), bool)
    for values in voxels_NC.T:
        inside &= values != values[0]
    chosen = np.flatnonzero(inside)
    return voxels_NC[chosen[:: max(1, len(chosen) // BRAIN_VOXELS)]]


def _tail(values: np.ndarray) -> float:
    if not values.size:
        return 0.0
    dark, middle, bright = np.percentile(values, (5, 50, 95))
    least = 1e-3 * (bright - dark)
    return math.log((bright - middle + least) / (middle - dark + least)) if least > 0 else 0.0


def _rank_correlations(brain_NC: np.ndarray) -> list[float]:
    """Spearman's correlation of each pair of channels; 0 if one is constant."""
    ranks = []
    for values in brain_NC.T:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - count / 2)[place]
        rank = rank - rank.mean() if rank.size else rank
        ranks.append(rank / (np.linalg.norm(rank) or 1.0))
    return [float(one @ other) for one, other in combinations(ranks, 2)]


def store_statistics(store: Store, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Range of each statistic over some of the named scans: [lowest, highest] by axis, channel or pair."""
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, MOST_SCANS).astype(int))] if names else []
    return ranges(scan_statistics(store.image(i), store.source_affine(i)) for i in map(store.index, chosen))


def ranges(scans: Iterable[dict[str, list[float]]]) -> dict[str, list[list[float]]]:
    """[lowest, highest] of each statistic of some scans; empty if there are none."""
    each = list(scans)
    lists = {key: zip(*(scan[key] for scan in each), strict=True) for key in (each[0] if each else ())}
    return {key: [[min(values), max(values)] for values in of_key] for key, of_key in lists.items()}


def background_warning(known: dict[str, Any], modalities: Sequence[str]) -> str | None:
    """A warning if scans have no background of zero, else None.

    Args:
        known: from `store_statistics`, possibly empty. modalities: names of the channels.
    """
    names = [name for name, (low, _) in zip(modalities, known.get("occupied", ())) if low > NO_BACKGROUND]
    if not names:
        return None
    return (
        f"{', '.join(names)}: more than {100 * NO_BACKGROUND:.0f} % of the voxels of each scan are not zero, so the "
        "z-score counts the background with the brain, and networks may find tumours outside it: set the background to "
        "zero with a brain mask for better results"
    )


def duplicate_channels(image_XYZC: np.ndarray, known: dict[str, Any], modalities: Sequence[str]) -> str | None:
    """The fault of two channels that hold the same voxels, or None; it is allowed where training had such channels.

    Args:
        image_XYZC: prepared. known: from `store_statistics`, possibly empty. modalities: names of the channels.
    """
    channels = np.moveaxis(image_XYZC, -1, 0)
    for (i, j), span in zip(_pairs(modalities), _spans(known, len(modalities))):
        one, other = channels[i], channels[j]
        if not np.array_equal(one[::16, ::16], other[::16, ::16]):  # comparing all voxels takes 10 ms a pair
            continue
        is_usual = span is not None and span[1] > NEARLY_ONE
        if not is_usual and np.array_equal(one, other) and one.min() < one.max():
            both = f"{modalities[i]} and {modalities[j]} are the same image"
            return f"{both}: give the file of each modality; the network was trained on two different ones"
    return None


def shift_warnings(scan: dict[str, list[float]], known: dict[str, Any], modalities: Sequence[str]) -> list[str]:
    """How a scan differs from those of training, a line each.

    Args:
        scan: from `scan_statistics`.
        known: from `store_statistics`; it may be empty, or from an earlier version, with fewer statistics.
        modalities: names of the channels.
    """
    found = [f"{name} holds nothing but zeros" for name, share in zip(modalities, scan["occupied"]) if share == 0]
    if not known:
        return found
    largest, known_largest = max(scan["spacing_mm"]), max(high for _, high in known["spacing_mm"])
    if largest > SPACING_FACTOR * known_largest:
        fault = f"voxels are up to {largest:.3g} mm long, in training they were up to {known_largest:.3g} mm"
        found.append(f"{fault}: the scan lacks details that the network looks for")
    for name, share, (low, high) in zip(modalities, scan["occupied"], known["occupied"]):
        if share and not low - OCCUPIED_SLACK <= share <= high + OCCUPIED_SLACK:
            fault = f"{100 * share:.0f} % of {name} is not zero, in training {_span(100 * low, 100 * high, '.0f')} %"
            found.append(f"{fault}: is it skull-stripped, with a background of zero?")
    for name, share, ratio, (low, high) in zip(modalities, scan["occupied"], scan["contrast"], known["contrast"]):
        if share and not low - CONTRAST_SLACK <= ratio <= high + CONTRAST_SLACK:
            fault = f"the mean of {name} is {ratio:.2g} deviations, in training {_span(low, high, '.2g')}"
            found.append(f"{fault}: is it that modality, with the scanner's own intensities?")
    return [*found, *_nearly_same(scan, known, modalities), *_reordered(scan, known, modalities)]


def _nearly_same(scan: dict[str, list[float]], known: dict[str, Any], modalities: Sequence[str]) -> list[str]:
    spans = _spans(known, len(modalities))
    return [
        f"{modalities[i]} and {modalities[j]} are nearly the same image (rank correlation {value:.3f}), in training "
        "they were not: is each file the right modality?"
        for (i, j), value, span in zip(_pairs(modalities), scan["correlation"], spans)
        if value > NEARLY_ONE and span is not None and span[1] <= NEARLY_ONE
    ]


def _reordered(scan: dict[str, list[float]], known: dict[str, Any], modalities: Sequence[str]) -> list[str]:
    """A warning if the channels clearly fit better in another order than in the given one."""
    count = len(modalities)
    if count < 2 or len(known.get("tail", ())) != count or None in _spans(known, count):
        return []
    correlation = np.eye(count)
    for (i, j), value in zip(_pairs(modalities), scan["correlation"]):
        correlation[i, j] = correlation[j, i] = value
    spans_R2 = np.array([*known["correlation"], *known["tail"]], float)
    slack_R = np.repeat((CORRELATION_SLACK, TAIL_SLACK), (len(known["correlation"]), count))

    def misfit(order: tuple[int, ...]) -> float:
        """How badly the channels fit when `order[i]` of those given is at position i."""
        found = [correlation[order[i], order[j]] for i, j in _pairs(modalities)]
        found_R = np.array([*found, *(scan["tail"][i] for i in order)])
        beyond_R = np.maximum(0, np.maximum(spans_R2[:, 0] - found_R, found_R - spans_R2[:, 1])) / slack_R
        return float(beyond_R @ beyond_R)

    misfits = {order: misfit(order) for order in permutations(range(count))}
    bound = min(misfits.values()) + REORDERED
    likely = [order for order, value in misfits.items() if value < bound]
    as_given = tuple(range(count))
    if as_given in likely:
        return []
    # The likely order that changes least.
    best = min(likely, key=lambda order: (sum(map(int.__ne__, order, as_given)), misfits[order]))
    changed = [f"{modalities[given]} looks like {modalities[i]}" for i, given in enumerate(best) if given != i]
    return [f"{', '.join(changed)} as training saw them: is each file the right modality?"]


def _pairs(modalities: Sequence[str]) -> list[tuple[int, int]]:
    return list(combinations(range(len(modalities)), 2))


def _spans(known: dict[str, Any], count: int) -> list[Any]:
    """The range of the correlation of each pair of channels; None for each if unknown."""
    pairs, spans = math.comb(count, 2), known.get("correlation", ())
    return list(spans) if len(spans) == pairs else [None] * pairs


def _span(low: float, high: float, spec: str) -> str:
    one, other = format(low, spec), format(high, spec)
    return one if one == other else f"{one} to {other}"

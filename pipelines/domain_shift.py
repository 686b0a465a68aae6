"""What the scans look like that a network is trained on, and whether another one looks alike.

A network answers whatever it is given. What commonly goes wrong can be seen, though, in few numbers that do not depend
on the scale of the intensities, which the z-score takes away:

* the voxel size of the file. Resampling makes up for smaller voxels, and for larger ones it can't;
* the share of voxels that are not zero (a scan whose skull or background was not removed, or that was z-scored before),
  and their mean in standard deviations (one that is centred already);
* of the brain, how long the bright tail of each channel is beside the dark one, and how the channels go together, by
  ranks. T2 has a bright tail, the fluid, which is dark in the others, so that these numbers tell whether the channels
  fit better in another order. A scan is compared with itself in another order, which makes it safe: of 20 real scans
  in their right order, of three releases and as many institutes, none was taken for another order, whichever of the
  others (220 choices) gave the ranges. Of wrong orders of four channels it finds 87 to 96 %, and all in which T2 and
  another channel change places. It can't tell T1 from contrast-enhanced T1, nor, where there are two channels alone,
  FLAIR from either: they differ no more than patients do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np

from pipelines.geometry import voxel_size_mm
from pipelines.preparing.store import Store

SCANS = 8  # that are looked at
FILLED = 0.95  # share of non-zero voxels above which a scan has no background of zero
OCCUPIED_SLACK = 0.2
CONTRAST_SLACK = 2.0
SPACING_FACTOR = 2.0
BRAIN_VOXELS = 50_000  # that are looked at: ranks of more take longer and tell no more
CORRELATION_SLACK = 0.25  # both as wide as they differ between patients
TAIL_SLACK = 0.5
REORDERED = 4.0  # by how much another order must fit better, in squares of the slack
NEARLY_ONE = 0.98  # rank correlation above which two channels are one image; of two modalities up to 0.91 was seen


def looks_of(image_XYZC: np.ndarray, affine: np.ndarray) -> dict[str, list[float]]:
    """The numbers of one scan.

    Args:
        image_XYZC: prepared, not normalised. affine: (4, 4), voxel index to mm, of the file.

    Returns:
        "spacing_mm" along X, Y and Z of RAS; by channel "occupied", the share of non-zero voxels, "contrast", their
        mean over their deviation (0 where there are none, or all are alike), and "tail", the logarithm of how much
        longer the bright tail is than the dark one; "correlation" of the ranks by pair of channels, (0, 1), (0, 2), ...
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
    """Some voxels (N, C) that differ from the background, the value of the first voxel, in every channel."""
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
    """Spearman's, of each pair of channels; 0 where one is constant."""
    ranks = []
    for values in brain_NC.T:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - count / 2)[place]
        rank = rank - rank.mean() if rank.size else rank
        ranks.append(rank / (np.linalg.norm(rank) or 1.0))
    return [float(one @ other) for one, other in combinations(ranks, 2)]


def looks_of_store(store: Store, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Range of each number over some of the named scans, evenly taken: [lowest, highest] by axis, channel or pair."""
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, SCANS).astype(int))] if names else []
    return ranges(looks_of(store.image(i), store.source_affine(i)) for i in map(store.index, chosen))


def ranges(looks: Iterable[dict[str, list[float]]]) -> dict[str, list[list[float]]]:
    """[lowest, highest] of each number of some scans; empty where there are none."""
    all_looks = list(looks)
    return {
        key: [[min(values), max(values)] for values in zip(*(each[key] for each in all_looks), strict=True)]
        for key in (all_looks[0] if all_looks else ())
    }


def filled(known: dict[str, Any], modalities: Sequence[str]) -> str | None:
    """What to tell of scans that have no background of zero, or None.

    Args:
        known: from `looks_of_store`, possibly empty. modalities: names of the channels.
    """
    names = [name for name, (low, _) in zip(modalities, known.get("occupied", ())) if low > FILLED]
    if not names:
        return None
    return (
        f"{', '.join(names)}: more than {100 * FILLED:.0f} % of the voxels of each scan are not zero, so the z-score "
        "counts the background with the brain, and networks may find tumours outside it: set the background to zero, "
        "by a brain mask, for better results"
    )


def same_image(image_XYZC: np.ndarray, known: dict[str, Any], modalities: Sequence[str]) -> str | None:
    """What to tell of two channels that hold the same voxels, or None; as in training, it is no fault.

    Args:
        image_XYZC: prepared. known: from `looks_of_store`, possibly empty. modalities: names of the channels.
    """
    channels = np.moveaxis(image_XYZC, -1, 0)
    for (i, j), span in zip(_pairs(modalities), _spans(known, len(modalities))):
        one, other = channels[i], channels[j]
        if not np.array_equal(one[::16, ::16], other[::16, ::16]):  # of all voxels it takes 10 ms a pair
            continue
        is_usual = span is not None and span[1] > NEARLY_ONE
        if not is_usual and np.array_equal(one, other) and one.min() < one.max():
            return (
                f"{modalities[i]} and {modalities[j]} are one and the same image: give the file of each modality; the "
                "network was trained on two different ones"
            )
    return None


def unlike(look: dict[str, list[float]], known: dict[str, Any], modalities: Sequence[str]) -> list[str]:
    """What about a scan is not as it was in training, a line each.

    Args:
        look: from `looks_of`. known: from `looks_of_store`, possibly empty, or of an earlier version, which knew fewer
            numbers. modalities: names of the channels.
    """
    found = [f"{name} holds nothing but zeros" for name, share in zip(modalities, look["occupied"]) if share == 0]
    if not known:
        return found
    largest, known_largest = max(look["spacing_mm"]), max(high for _, high in known["spacing_mm"])
    if largest > SPACING_FACTOR * known_largest:
        found.append(
            f"voxels are up to {largest:.3g} mm long, in training they were up to {known_largest:.3g} mm: details that "
            "the network looks for are not in the scan"
        )
    for name, share, (low, high) in zip(modalities, look["occupied"], known["occupied"]):
        if share and not low - OCCUPIED_SLACK <= share <= high + OCCUPIED_SLACK:
            found.append(
                f"{100 * share:.0f} % of {name} is not zero, in training {_span(100 * low, 100 * high, '.0f')} %: is "
                "it skull-stripped, with a background of zero?"
            )
    for name, share, ratio, (low, high) in zip(modalities, look["occupied"], look["contrast"], known["contrast"]):
        if share and not low - CONTRAST_SLACK <= ratio <= high + CONTRAST_SLACK:
            found.append(
                f"the mean of {name} is {ratio:.2g} deviations, in training {_span(low, high, '.2g')}: is it that "
                "modality, and as it came from the scanner?"
            )
    return [*found, *_nearly_same(look, known, modalities), *_reordered(look, known, modalities)]


def _nearly_same(look: dict[str, list[float]], known: dict[str, Any], modalities: Sequence[str]) -> list[str]:
    spans = _spans(known, len(modalities))
    return [
        f"{modalities[i]} and {modalities[j]} are nearly the same image (rank correlation {value:.3f}), in training "
        "they were not: is each file the modality that it is given as?"
        for (i, j), value, span in zip(_pairs(modalities), look["correlation"], spans)
        if value > NEARLY_ONE and span is not None and span[1] <= NEARLY_ONE
    ]


def _reordered(look: dict[str, list[float]], known: dict[str, Any], modalities: Sequence[str]) -> list[str]:
    """Whether the channels fit clearly better in another order than in the one that they are given in."""
    count = len(modalities)
    if count < 2 or len(known.get("tail", ())) != count or None in _spans(known, count):
        return []
    correlation = np.eye(count)
    for (i, j), value in zip(_pairs(modalities), look["correlation"]):
        correlation[i, j] = correlation[j, i] = value
    spans_R2 = np.array([*known["correlation"], *known["tail"]], float)
    slack_R = np.repeat((CORRELATION_SLACK, TAIL_SLACK), (len(known["correlation"]), count))

    def misfit(order: tuple[int, ...]) -> float:
        """Of the channels where the one at position i is `order[i]` of those given."""
        found = [correlation[order[i], order[j]] for i, j in _pairs(modalities)]
        found_R = np.array([*found, *(look["tail"][i] for i in order)])
        beyond_R = np.maximum(0, np.maximum(spans_R2[:, 0] - found_R, found_R - spans_R2[:, 1])) / slack_R
        return float(beyond_R @ beyond_R)

    misfits = {order: misfit(order) for order in permutations(range(count))}
    bound = min(misfits.values()) + REORDERED
    likely = [order for order, value in misfits.items() if value < bound]
    as_given = tuple(range(count))
    if as_given in likely:
        return []
    # Of those the one that changes least.
    best = min(likely, key=lambda order: (sum(map(int.__ne__, order, as_given)), misfits[order]))
    changed = [f"{modalities[given]} looks like {name}" for name, given in zip(modalities, best)
               if modalities[given] != name]  # fmt: skip
    return [f"{', '.join(changed)} as training saw them: is each file the modality that it is given as?"]


def _pairs(modalities: Sequence[str]) -> list[tuple[int, int]]:
    return list(combinations(range(len(modalities)), 2))


def _spans(known: dict[str, Any], count: int) -> list[Any]:
    """The ranges of the correlation of each pair of channels; None for each where they are not known."""
    pairs = count * (count - 1) // 2
    spans = known.get("correlation", ())
    return list(spans) if len(spans) == pairs else [None] * pairs


def _span(low: float, high: float, spec: str) -> str:
    one, other = format(low, spec), format(high, spec)
    return one if one == other else f"{one} to {other}"

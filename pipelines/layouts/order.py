"""The 3D files of one case in the order of a network's modalities: by what their names say, or as given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.layouts.names import canonical_modalities, modality_of


def in_order(files: Sequence[Path], needed: Sequence[str], given: Sequence[str] | None = None) -> tuple[Path, ...]:
    """The files of the modalities that are needed, in their order.

    Args:
        files: of one case, in any order where every name says its modality (`pipelines.layouts.names.modality_of`).
        needed: modalities of the network, in its order.
        given: the modality of each file, as the user says; None: as the names say, else in the order of `needed`.

    Raises:
        ValueError: too many or too few files, one that is given twice (by a link, too), one whose name says another
            modality, or a needed modality without a file.
    """
    _check_different(files)
    named = [modality_of(path) for path in files]
    listing = ", ".join(path.name for path in files)
    if given is not None:
        order = list(canonical_modalities(given))
    else:
        order = [modality for modality in named if modality] if all(named) else list(needed)
    if len(order) != len(files):
        unnamed = [path.name for path, says in zip(files, named) if any(named) and not says]
        raise ValueError(
            f"{len(files)} files ({listing}) for {len(order)} modalities: give the files of {', '.join(order)}, in "
            "this order unless every name says its modality (case_flair.nii.gz), or one 4D file"
            + (f"; no modality in {', '.join(unnamed)}" if unnamed else "")
        )
    for path, says, taken in zip(files, named, order):
        if says and says != taken:
            raise ValueError(
                f"{path} is given as {taken}, but its name says {says}: correct the order of the files or of the "
                "modalities, or rename the file"
            )
    twice = next((modality for modality in order if order.count(modality) > 1), None)
    if twice:
        names = " and ".join(path.name for path, modality in zip(files, order) if modality == twice)
        raise ValueError(f"{names} are both {twice} by name: give one file of each modality of one case")
    missing = [modality for modality in needed if modality not in order]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)} among {listing} ({', '.join(order)}): the network needs {', '.join(needed)}"
        )
    return tuple(files[order.index(modality)] for modality in needed)


def _check_different(files: Sequence[Path]) -> None:
    """Refuse a file that is given twice; a missing one is reported when it is read."""
    first: dict[tuple[int, int], Path] = {}
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            continue
        key = (status.st_dev, status.st_ino)
        if key in first:
            what = "is given twice" if first[key] == path else f"is the same file as {first[key]}"
            raise ValueError(f"{path} {what}: give the file of each modality")
        first[key] = path

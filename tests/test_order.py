"""Files of one case, put into the order of the network's modalities."""

from __future__ import annotations

import os
from itertools import permutations
from pathlib import Path

import pytest

from pipelines.layouts.names import in_order

ORDER = ("flair", "t1", "t1c", "t2")


def files(*names: str) -> list[Path]:
    return [Path(name) for name in names]


@pytest.mark.parametrize(
    "named",
    [
        ("a-t2f.nii.gz", "a-t1n.nii.gz", "a-t1c.nii.gz", "a-t2w.nii.gz"),
        ("a_FLAIR.nii", "a_t1.nii", "a_t1Gd.nii", "a_T2.nii"),
        ("flair.nii.gz", "t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz"),
    ],
)
def test_names_that_tell_their_modality_go_before_the_order(named: tuple[str, ...]) -> None:
    for given in permutations(named):
        assert in_order(files(*given), ORDER) == tuple(files(*named))


def test_of_files_whose_names_tell_more_than_is_needed_those_that_are_needed_are_taken() -> None:
    given = files("a-t1c.nii.gz", "a-t1n.nii.gz", "a-t2f.nii.gz", "a-t2w.nii.gz")
    assert in_order(given, ("flair", "t1c")) == (given[2], given[0])


def test_names_that_tell_nothing_are_taken_in_their_order_or_as_is_said() -> None:
    given = files("1.nii", "2.nii", "3.nii", "4.nii")
    assert in_order(given, ORDER) == tuple(given)
    assert in_order(given, ORDER, ("t2w", "t1ce", "T1", "FLAIR")) == tuple(reversed(given))
    assert in_order(given[:2], ("t1c",), ("t1", "t1c")) == (given[1],)


@pytest.mark.parametrize(
    ("named", "given", "says"),
    [
        (("a_t1.nii", "a_flair.nii"), ("flair", "t1"), "a_t1.nii is given as flair, but its name says t1"),
        (("a_t1.nii", "scan.nii"), None, "a_t1.nii is given as flair, but its name says t1"),
        (("a_t1.nii", "b_t1.nii"), None, "a_t1.nii and b_t1.nii are both t1 by name"),
        (("a_t2.nii", "a_t1.nii"), None, r"no flair among a_t2.nii, a_t1.nii \(t2, t1\): the network needs flair, t1"),
        (("1.nii", "2.nii", "3.nii"), None, r"3 files \(1.nii, 2.nii, 3.nii\) for 2 modalities: give .* flair, t1"),
        (("a_t1.nii", "a_flair.nii", "a_seg.nii"), None, "3 files .*; no modality in a_seg.nii"),
        (("1.nii", "2.nii"), ("t1", "pd"), "name at least one of flair"),
    ],
)
def test_files_that_contradict_their_order_or_each_other_are_refused(
    named: tuple[str, ...], given: tuple[str, ...] | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in named:
        Path(name).write_text(name)
    with pytest.raises(ValueError, match=says):
        in_order(files(*named), ("flair", "t1"), given)


def test_a_file_that_is_given_twice_is_refused_by_whatever_name(tmp_path: Path) -> None:
    scan = tmp_path / "scan_flair.nii"
    scan.write_text("")
    (tmp_path / "symbolic_t1.nii").symlink_to(scan)
    os.link(scan, tmp_path / "hard_t1.nii")
    for other in ("symbolic_t1.nii", "hard_t1.nii"):
        with pytest.raises(ValueError, match=f"{other} is the same file as .*scan_flair.nii"):
            in_order([scan, tmp_path / other], ("flair", "t1"))
    with pytest.raises(ValueError, match="scan_flair.nii is given twice"):
        in_order([scan, scan], ("flair", "t1"))

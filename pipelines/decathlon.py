"""Download Task01 (brain tumours, 7.1 GB) of the Medical Segmentation Decathlon.

Address, MD5 and layout are those of `monai.apps.DecathlonDataset`: <folder>/Task01_BrainTumour.tar and
<folder>/Task01_BrainTumour/. Unlike MONAI's, the download continues where it was interrupted (HTTP Range into
`.tar.part`), a `.tar` has passed its checksum, and the task folder appears only once everything is unpacked.

The archive's paths are not trusted: a member that is a link or a device, or points outside, is an error before anything
is written. macOS's `._*` companion files are skipped.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath

from rich.progress import DownloadColumn, Progress, TaskID, TransferSpeedColumn

from pipelines.basics.errors import DataError

log = logging.getLogger(__name__)

TASK = "Task01_BrainTumour"
URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task01_BrainTumour.tar"
MD5 = "240a19d752f0d9e9101544901065d872"
_CHUNK = 1 << 20
_TIMEOUT_S = 30
_ATTEMPTS = 4  # in a row that gain no byte
_WAIT_S = 2.0  # before the second, doubling


def download_task01(folder: Path, url: str = URL, md5: str = MD5) -> Path:
    """Fetch and unpack Task01, unless it is there already; continue an interrupted download.

    Args:
        folder: where the archive and the task folder go.
        url, md5: of the archive; a mirror will do.

    Returns:
        the task folder, which holds `dataset.json`.

    Raises:
        DataError: the network fails (the message says what to put where by hand), the checksum differs, the archive is
            unsafe or not Task01, or the task folder has no `dataset.json`.
    """
    folder = Path(folder)
    task, archive = folder / TASK, folder / f"{TASK}.tar"
    if (task / "dataset.json").is_file():
        return task
    if task.exists():
        raise DataError(f"{task} exists but has no dataset.json: complete it, or move it away and run again")
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()) as progress:
        if archive.is_file():
            _check_md5(archive, md5, progress, "move it away, or replace it with a complete one, and run again")
        else:
            part = archive.with_name(archive.name + ".part")
            _fetch(url, part, archive, md5, progress)
            try:
                _check_md5(part, md5, progress, "it has been deleted: run again")
            except DataError:
                part.unlink()
                raise
            os.replace(part, archive)
        _unpack(archive, task, progress)
    log.info("%s is ready; %s is no longer needed", task, archive)
    return task


def _fetch(url: str, part: Path, archive: Path, md5: str, progress: Progress) -> None:
    """Fetch the rest of url into part; try again as long as that gains anything."""
    bar = progress.add_task(f"download {TASK}", total=None)
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part, progress, bar)
            return
        except urllib.error.HTTPError as error:
            reason: Exception = error
            failures = failures + 1 if error.code >= 500 else _ATTEMPTS
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            gained = part.exists() and part.stat().st_size > before
            reason, failures = error, 1 if gained else failures + 1
        if failures >= _ATTEMPTS:
            raise DataError(
                f"cannot download {url}: {reason}. Run again to continue, or do it by hand: fetch that file elsewhere "
                f"(md5 {md5}), put it at {archive}, and run again. A folder that is already unpacked goes to "
                f"{archive.with_suffix('')}"
            ) from reason
        log.warning("download of %s was interrupted (%s): trying again", url, reason)
        time.sleep(_WAIT_S * 2 ** (failures - 1))


def _fetch_rest(url: str, part: Path, progress: Progress, bar: TaskID) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing left to fetch; the checksum shows whether it is right
            return
        raise
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        progress.update(bar, total=total, completed=start)
        with part.open("ab" if start else "wb", buffering=0) as file:
            while chunk := response.read(_CHUNK):
                progress.advance(bar, len(chunk))
                try:
                    while chunk:
                        chunk = chunk[file.write(chunk) :]
                except OSError as error:
                    raise DataError(
                        f"{part} can't be written ({error.strerror}): free space in {part.parent}, or choose another "
                        "--data.root; run again to continue"
                    ) from error
            size = file.tell()
    if total is not None and size < total:  # read(n) returns b"" on a dropped connection, as at the end
        raise ConnectionError(f"connection closed after {size} of {total} bytes")


def _check_md5(path: Path, md5: str, progress: Progress, remedy: str) -> None:
    with progress.open(path, "rb", description="checksum") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise DataError(f"{path} has md5 {digest.hexdigest()}, must be {md5}: {remedy}")


def _unpack(archive: Path, task: Path, progress: Progress) -> None:
    """Unpack beside the task folder, then rename: the folder is complete or does not exist."""
    staging = archive.with_name(f".{TASK}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tarfile.open(archive, "r:") as tar:  # not compressed: what comes out is no longer than it is
            members = [m for m in tar.getmembers() if not PurePosixPath(m.name).name.startswith("._")]
            for member in members:
                path = PurePosixPath(member.name)
                is_plain = member.isfile() or member.isdir()
                if path.is_absolute() or ".." in path.parts or not is_plain or member.issparse():
                    raise DataError(
                        f"{archive}: member {member.name!r} is a link, a device, a sparse file or a path out of the "
                        f"folder; nothing was unpacked. Do not use this archive; fetch it again from {URL}"
                    )
            for member in progress.track(members, description=f"unpack {TASK}"):
                tar.extract(member, staging, filter="data")
        if not (staging / TASK / "dataset.json").is_file():
            raise DataError(f"{archive} holds no {TASK}/dataset.json: it is not Task01; move it away and run again")
        os.replace(staging / TASK, task)
    except tarfile.TarError as error:
        raise DataError(f"{archive} is not a readable tar archive ({error}): move it away and run again") from error
    except OSError as error:
        raise DataError(
            f"{archive} can't be unpacked to {task} ({error.strerror}): free space in {task.parent}, as much as the "
            "archive has, or change its permissions, and run again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)

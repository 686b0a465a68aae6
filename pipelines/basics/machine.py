"""The cache folder, a home folder for the packages that want one, and the processors.

The user of a container or a cluster may have no entry in the system's list of users, no HOME, or one (`/`) that can't
be written to. Matplotlib, Triton, PyTorch and DeepSpeed each keep caches below it. This file is needed before them, so
it imports nothing heavy.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where `getpass.getuser` looks before it asks the system


def cache_dir() -> Path:
    """Where prepared volumes and synthetic scans go: `GLIOFORGE_CACHE`, else `$XDG_CACHE_HOME/glioforge`, else in home.

    Raises:
        ValueError: there is no such place, or it can't be made.
    """
    folder = _chosen_cache()
    if folder is None and not _has_home():
        raise ValueError(
            "no place for prepared volumes and synthetic scans, as this user has no home folder to write to: "
            "set GLIOFORGE_CACHE (or XDG_CACHE_HOME) to a folder"
        )
    folder = folder or Path.home() / ".cache" / "glioforge"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder of prepared volumes and synthetic scans, {folder}, can't be made ({error.strerror}): set "
            "GLIOFORGE_CACHE to another"
        ) from error
    return folder


def give_home() -> None:
    """Make sure that HOME can be written to and that the user has a name, for the packages that are imported later.

    If it can't, HOME becomes a folder in the cache, else a private one among the system's temporary folders.
    """
    if not any(map(os.environ.get, _NAMES)):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"
    if _has_home():
        return
    cache = _chosen_cache()
    for folder in filter(None, (cache and cache / f"home-{os.getuid()}", _temporary_home())):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.lstat()
        except OSError:  # reported by `cache_dir`, if the cache is needed
            continue
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():  # nobody else's: code is run from there
            os.environ["HOME"] = str(folder)
            return


def _chosen_cache() -> Path | None:
    own, shared = os.environ.get("GLIOFORGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).absolute() if own else Path(shared).absolute() / "glioforge" if shared else None


def _has_home() -> bool:
    home = os.path.expanduser("~")
    return home != "~" and Path(home) != _temporary_home() and os.access(home, os.W_OK | os.X_OK)


def _temporary_home() -> Path | None:
    try:
        return Path(tempfile.gettempdir()) / f"glioforge-{os.getuid()}"
    except FileNotFoundError:
        return None


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

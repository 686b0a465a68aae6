"""Users without a home folder."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
from commands import TRAIN, write_small

from pipelines.basics.machine import cache_dir, give_home


def unknown(uid: int) -> NoReturn:
    raise KeyError(uid)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user whom the system does not know, without HOME, and with temporary files in a folder of the test's."""
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "GLIOFORGE_CACHE", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_cache_is_the_first_that_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no home folder to write to: set GLIOFORGE_CACHE"):
        cache_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "glioforge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "glioforge"
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_a_cache_that_cannot_be_made_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="file/cache, can't be made .Not a directory.: set GLIOFORGE_CACHE to another"):
        cache_dir()


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_packages_get_a_home_in_the_cache(home: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "cache"))
    if home:
        monkeypatch.setenv("HOME", home)
    give_home()
    assert os.environ["HOME"] == str(tmp_path / "cache" / f"home-{os.getuid()}")
    assert Path.home().stat().st_mode & 0o777 == 0o700
    assert os.environ["USER"] == f"uid-{os.getuid()}"
    assert cache_dir() == tmp_path / "cache"


def test_without_a_cache_packages_get_a_temporary_home_that_is_not_a_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(2):  # the process that this one starts finds it as HOME
        give_home()
        assert os.environ["HOME"] == str(tmp_path / f"glioforge-{os.getuid()}")
        with pytest.raises(ValueError, match="set GLIOFORGE_CACHE"):
            cache_dir()


def test_a_temporary_home_that_is_a_link_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"glioforge-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    give_home()
    assert "HOME" not in os.environ


def test_a_home_that_is_there_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "cache"))
    give_home()
    assert (os.environ["HOME"], os.environ["USER"]) == (str(tmp_path), "somebody")


def test_training_runs_for_a_user_without_a_home(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    )
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, "GLIOFORGE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(TRAIN), "--config", str(write_small(tmp_path)), "--train.epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["runs"]
    assert any((tmp_path / "cache" / f"home-{os.getuid()}").iterdir())  # Matplotlib's, at least

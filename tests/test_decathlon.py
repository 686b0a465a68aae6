"""The download against a real HTTP server on this machine that honours ranges, drops connections, and lies."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from monai.apps import DecathlonDataset
from test_store import files_of_at_most

from pipelines import decathlon
from pipelines.basics.errors import DataError
from pipelines.decathlon import MD5, TASK, URL, download_task01

BIG = bytes(range(256)) * 12_000  # 3 MB: more than one read


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def task01(*extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    entries = {"dataset.json": json.dumps({"name": "BRATS"}).encode(), "imagesTr/BRATS_001.nii.gz": BIG, "._x": b"mac"}
    return tar_of(*((tarfile.TarInfo(f"{TASK}/{name}"), data) for name, data in entries.items()), *extra)


class Server(http.server.ThreadingHTTPServer):
    """Serves `data`. `drops` holds after how many bytes each of the next answers breaks off."""

    data = b""
    drops: list[int] = []
    ranges = True
    status = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if server.status or start >= len(server.data):
            self.send_error(server.status or 416)
            return
        body = server.data[start:]
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.drops.pop(0)] if server.drops else body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(decathlon, "_WAIT_S", 0.01)
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetch(folder: Path, server: Server, md5: str | None = None) -> Path:
    url = f"http://127.0.0.1:{server.server_address[1]}/{TASK}.tar"
    return download_task01(folder, url, md5 or hashlib.md5(server.data).hexdigest())


def test_address_and_checksum_are_monais() -> None:
    assert DecathlonDataset.resource[TASK] == URL and DecathlonDataset.md5[TASK] == MD5


def test_a_full_disk_names_the_file_and_the_download_continues_from_there(tmp_path: Path, server: Server) -> None:
    server.data = task01()
    archive = tmp_path / f"{TASK}.tar"
    with (
        files_of_at_most(2_000_000),
        pytest.raises(DataError, match=rf"{archive}.part can't be written \(.*{tmp_path}"),
    ):
        fetch(tmp_path, server)
    assert [path.name for path in tmp_path.iterdir()] == [f"{TASK}.tar.part"]
    archive.write_bytes(server.data)  # there is room for it, and for nothing else
    with files_of_at_most(2_000_000), pytest.raises(DataError, match=rf"{archive} can't be unpacked to .*{tmp_path}"):
        fetch(tmp_path, server)
    assert {path.name for path in tmp_path.iterdir()} == {f"{TASK}.tar.part", f"{TASK}.tar"}
    archive.unlink()
    assert (fetch(tmp_path, server) / "imagesTr/BRATS_001.nii.gz").read_bytes() == BIG
    assert server.asked == [None, "bytes=2000000-"]


def test_a_complete_task_is_left_alone(tmp_path: Path, server: Server) -> None:
    server.data = task01()
    task = fetch(tmp_path, server)
    assert task == tmp_path / TASK and (task / "imagesTr/BRATS_001.nii.gz").read_bytes() == BIG
    assert {p.name for p in tmp_path.iterdir()} == {TASK, f"{TASK}.tar"}, "nothing half done stays behind"
    assert not (task / "._x").exists()
    before = (task / "dataset.json").stat().st_mtime_ns
    assert fetch(tmp_path, server) == task
    assert len(server.asked) == 1 and (task / "dataset.json").stat().st_mtime_ns == before


def test_a_dropped_connection_is_resumed_where_it_broke_off(tmp_path: Path, server: Server) -> None:
    server.data = task01()
    server.drops = [1_000_000, 500_000]
    assert (fetch(tmp_path, server) / "imagesTr/BRATS_001.nii.gz").read_bytes() == BIG
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_new_run_resumes_what_an_earlier_one_left(tmp_path: Path, server: Server) -> None:
    server.data = task01()
    (tmp_path / f"{TASK}.tar.part").write_bytes(server.data[:123_457])
    fetch(tmp_path, server)
    assert server.asked == ["bytes=123457-"]


def test_a_part_that_is_whole_already_is_taken(tmp_path: Path, server: Server) -> None:
    server.data = task01()
    (tmp_path / f"{TASK}.tar.part").write_bytes(server.data)
    assert (fetch(tmp_path, server) / "dataset.json").is_file()


def test_a_server_without_ranges_starts_again_from_the_first_byte(tmp_path: Path, server: Server) -> None:
    server.data, server.ranges, server.drops = task01(), False, [1_000_000]
    assert (fetch(tmp_path, server) / "imagesTr/BRATS_001.nii.gz").read_bytes() == BIG


def test_a_wrong_checksum_is_an_error_and_leaves_nothing_to_trust(tmp_path: Path, server: Server) -> None:
    server.data = task01()
    with pytest.raises(DataError, match=f"has md5 {hashlib.md5(server.data).hexdigest()}, must be {MD5}"):
        fetch(tmp_path, server, MD5)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_put_there_by_hand_is_checked_unpacked_and_never_deleted(tmp_path: Path, server: Server) -> None:
    server.data = task01()
    archive = tmp_path / f"{TASK}.tar"
    archive.write_bytes(server.data[:-1])
    with pytest.raises(DataError, match=f"{archive} has md5"):
        fetch(tmp_path, server)
    assert archive.is_file()
    archive.write_bytes(server.data)
    assert (fetch(tmp_path, server) / "dataset.json").is_file()
    assert server.asked == []


@pytest.mark.parametrize("status", [403, 503])
def test_a_refusing_network_says_what_to_put_where(tmp_path: Path, server: Server, status: int) -> None:
    server.status = status
    with pytest.raises(
        DataError, match=rf"http://127.*{status}.*md5 {MD5}.*put it at {tmp_path / TASK}\.tar.*run again"
    ):
        fetch(tmp_path, server, MD5)
    assert len(server.asked) == (1 if status == 403 else 4)


def test_no_server_at_all_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decathlon, "_WAIT_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match=r"cannot download .*by hand"):
        download_task01(tmp_path, "http://127.0.0.1:9/x.tar")


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"{TASK}/link")
    info.type, info.linkname = kind, target
    return info


def sparse(size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"{TASK}/holes")
    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(size)}
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("/tmp/glioforge-escaped"),
        tarfile.TarInfo(f"{TASK}/../../escaped"),
        link(tarfile.SYMTYPE, "/etc/passwd"),
        link(tarfile.LNKTYPE, "../escaped"),
        link(tarfile.FIFOTYPE, ""),
        sparse(10**12),
    ],
    ids=["absolute", "parent", "symlink", "hardlink", "fifo", "sparse"],
)
def test_an_archive_that_reaches_out_is_refused_before_anything_is_written(
    tmp_path: Path, server: Server, member: tarfile.TarInfo
) -> None:
    server.data = task01((member, b""))
    with pytest.raises(DataError, match="nothing was unpacked"):
        fetch(tmp_path, server)
    assert {p.name for p in tmp_path.iterdir()} == {f"{TASK}.tar"}
    assert not Path("/tmp/glioforge-escaped").exists()


@pytest.mark.parametrize(
    "data",
    [b"no tar" * 500, tar_of((tarfile.TarInfo("other/dataset.json"), b"{}")), gzip.compress(task01())],
    ids=["no_tar", "other", "compressed"],
)
def test_an_archive_that_is_not_task01_is_named(tmp_path: Path, server: Server, data: bytes) -> None:
    server.data = data
    with pytest.raises(DataError, match=rf"{TASK}\.tar"):
        fetch(tmp_path, server)
    assert not (tmp_path / TASK).exists()


def test_a_task_folder_without_dataset_json_is_not_written_over(tmp_path: Path, server: Server) -> None:
    (tmp_path / TASK).mkdir()
    with pytest.raises(DataError, match="has no dataset.json"):
        fetch(tmp_path, server)

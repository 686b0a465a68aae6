"""Options of the commands beside those of the configuration, and their YAML files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from jsonargparse import Namespace

from engine.parser import Parser, parse_yaml, read_yaml
from launch import compare, convert, evaluate, predict, prepare
from pipelines.basics.option_values import Bounds


def parse(*args: str) -> Namespace:
    parser = Parser("A command.")
    parser.add_argument("source", type=Path, help="What to read.")
    parser.add_argument("--to", choices=("onnx", "bundle"), help="Format.")
    parser.add_argument("--runs", type=Path, nargs="+", help="Folders.")
    parser.add_argument("--cases", nargs="+", help="Names.")
    parser.add_argument("--count", type=int, bounds=Bounds(1, 9), default=1, help="How often.")
    parser.add_argument("--output", type=Path, required=True, help="File.")
    parser.add_argument("--overwrite", action="store_true", help="Replace it.")
    return parser.parse_args(list(args))


def test_words_go_to_the_options_that_take_them() -> None:
    found = parse("in", "--output=out", "--overwrite", "--runs", "a", "b,c", "--cases", "x,y", "z", "--count", "3")
    assert (found.source, found.output, found.overwrite, found.count) == (Path("in"), Path("out"), True, 3)
    assert (found.runs, found.cases, found.to) == ([Path("a"), Path("b,c")], ["x", "y", "z"], None)
    for args in (
        ["--overwrite", "in", "--output", "out"],
        ["--output", "out", "in"],
        ["--count", "1", "in", "--output=out"],
    ):
        assert parse(*args).source == Path("in")
    assert parse("null", "--output", "~x", "--output", "# x").output == Path("# x")  # the last one counts


def test_the_launchers_local_rank_is_ignored() -> None:
    for words in (["--local_rank=1"], ["--local_rank", "1"]):
        assert parse(*words, "in", "--output", "out").source == Path("in")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in"], "--output must be given; see --help"),
        ([], "source, --output must be given; see --help"),
        (["in", "more", "--output", "out"], "unexpected argument more; see --help"),
        (["in", "-o", "--output", "out"], "unexpected argument -o"),
        (["in", "--output"], "--output needs a value: a path"),
        (["in", "--output="], "--output '' .nothing. must be a path"),
        (["in", "--output", "out", "--to", "onx"], "--to onx must be one of onnx, bundle; did you mean onnx.$"),
        (["in", "--output", "out", "--count", "10"], "--count 10 must be at most 9"),
        (["in", "--output", "out", "--overwrite=maybe"], "--overwrite maybe must be true or false"),
        (["in", "--outptu", "out"], "there is no option --outptu; did you mean --output.$"),
        (["in", "--output", "out", "--"], "there is no option --;"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        parse(*args)
    assert "\n" not in str(raised.value)


def test_a_file_holds_the_same_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("output: null.onnx\noverwrite: true\nruns: [a, 'b,c']\ncases: x, y\ncount: 3\nto: onnx\n")
    found = parse("in", "--config", str(file), "--count", "4")
    assert (found.output, found.overwrite, found.count, found.to) == (Path("null.onnx"), True, 4, "onnx")
    assert (found.runs, found.cases, found.config) == ([Path("a"), Path("b,c")], ["x", "y"], [file])
    other = tmp_path / "other.yaml"
    other.write_text("count: 5\nconfig: mine.yaml\n")
    with pytest.raises(ValueError, match="other.yaml: there is no option config; --help lists all"):
        parse("in", "--config", str(file), "--config", str(other))
    other.write_text("count: 5\n")
    assert parse("in", "--count", "4", "--config", str(file)).count == 4  # wherever the file stands
    assert parse("in", "--config", str(file), "--config", str(other)).count == 5


@pytest.mark.parametrize(
    ("command", "wrong", "meant"),
    [
        (predict, "--run", "--runs"),
        (predict, "--modality", "--modalities"),
        (evaluate, "--data.release", "--release"),
        (convert, "--overwite", "--overwrite"),
        (convert, "--crop_size_voxels", "--data.crop_size_voxels"),
        (compare, "--seed", "--data.phantom.seed or --train.seed"),
        (prepare, "--chekc", "--check"),
    ],
)
def test_every_command_suggests_the_option_that_was_meant(
    command: object, wrong: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([wrong, "x"]) == 2  # type: ignore[attr-defined]
    assert capsys.readouterr().err == f"error: there is no option {wrong}; did you mean {meant}?\n"


# YAML files


def test_scalars_stay_text_and_only_null_is_none() -> None:
    content = b"\xef\xbb\xbfa: 00001\nb: 1e-4\nc: on\nd: 2024-01-01\ne: 'null'\nf: null\ng: ~\nh:\ni: '~'\n<<: x\n"
    assert parse_yaml(content, "a.yaml") == {
        "a": "00001", "b": "1e-4", "c": "on", "d": "2024-01-01", "e": "null", "f": None, "g": None, "h": None, "i": "~",
        "<<": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", "a.yaml is not an options file: line 2: a is given twice"),
        (b"a: {b: {c: 1}}\nd: {e: 1,\n    e: 2}\n", "a.yaml is not an options file: line 3: e is given twice"),
        (b"a: &x [1]\nb: [*x, *x]\n", "a.yaml is not an options file: line 1: anchors"),
        (b"a: *x\n", "a.yaml is not an options file: line 1: anchors"),
        (
            b"a: !!python/object/apply:os.getcwd []\n",
            "a.yaml is not an options file: line 1: tags .*python.* are not allowed",
        ),
        (b"a: !!timestamp x\n", "a.yaml is not an options file: line 1: tags"),
        (b"a:\n\tb: 1\n", "a.yaml is not an options file: line 2: .*indent with spaces, not tabs"),
        (b"a: [\n", "a.yaml is not an options file: line "),
        (b"a: 1\n---\na: 2\n", "a.yaml is not an options file: line 2: but found another document"),
        (b"? [1]\n: 2\n", "a.yaml is not an options file: line 1: found unhashable key"),
        (b"a: \0\n", "a.yaml is not an options file: unacceptable character"),
        ("a: ü\n".encode("latin-1"), "a.yaml is not an options file: byte 3 is not UTF-8; save it as UTF-8"),
        (b"[" * 50_000, "a.yaml is not an options file: its brackets are nested too deeply"),
        (b"a: " + b"{b: " * 5_000, "a.yaml is not an options file: its brackets are nested too deeply"),
    ],
)
def test_a_wrong_options_file_is_refused_by_file_and_line(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_yaml(content, "a.yaml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_a_path_that_is_not_an_options_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: give a YAML file"):
        read_yaml(tmp_path)
    with pytest.raises(ValueError, match="/dev/zero is a device: give a YAML file"):
        read_yaml(Path("/dev/zero"))
    with pytest.raises(ValueError, match="a.yaml can't be read .No such file or directory.: correct the path"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "scan.nii").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match="scan.nii is larger than 1 MiB"):
        read_yaml(tmp_path / "scan.nii")


def test_a_pipe_is_read_as_shells_give_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # as --config <(...)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a: {b: 1}\n",))
    writer.start()
    assert read_yaml(tmp_path / "pipe") == {"a": {"b": "1"}}
    writer.join()

"""Options of the commands beside those of the configuration, and their YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from engine.parser import Parser
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

"""The folders keep their order: imports lead down, every file says what it is for and has tests of its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import make_structure
import pytest
from make_structure import File, file_graph, find_circle, floors, folder_graph, read_files, within, without_implied

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    ("launch",),
    ("engine/export", "engine/reports"),
    ("engine",),
    ("engine/ranks",),
    ("models", "pipelines"),
    ("kernels",),
)
"""Folders from the top down, each with its subfolders. A file may import from its own entry and from lower rows."""
TESTED_ELSEWHERE = {
    "launch.evaluate": "test_score_cases.py",
    "launch.predict": "test_segment_cases.py",
    "launch.train": "test_run.py",
}
"""Files without a `test_<file>.py`, and where their tests are. Where two files share a name, with the folder."""

FILES = read_files(ROOT)
PRODUCT = within(FILES, *make_structure.PACKAGES)


def _read(root: Path, sources: Mapping[str, str]) -> dict[str, File]:
    """A checkout with these files, as it is read."""
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_files(root)


def _layer(folder: str) -> tuple[int, str]:
    """The row of LAYERS that a folder is in, and the entry there."""
    fitting = [(row, name) for row, names in enumerate(LAYERS) for name in names if f"{folder}/".startswith(f"{name}/")]
    return max(fitting, key=lambda place: len(place[1]))


def _names(module: str, modules: Sequence[str]) -> set[str]:
    """What a file may be called by: folder and file or, if no other file has its name, the file alone."""
    folder, stem = module.split(".")[-2:]
    is_only = sum(other.endswith(f".{stem}") for other in modules) == 1
    return {f"{folder}.{stem}", stem} if is_only else {f"{folder}.{stem}"}


def test_no_import_points_up() -> None:
    upward = []
    for name, others in file_graph(PRODUCT).items():
        row, entry = _layer(PRODUCT[name].folder)
        for other in others:
            other_row, other_entry = _layer(PRODUCT[other].folder)
            if other_row <= row and other_entry != entry:
                upward.append(f"{name} imports {other}")
    assert not upward


def test_imports_form_no_circle() -> None:
    assert not find_circle(file_graph(FILES))
    assert not find_circle(folder_graph(FILES))


def test_every_file_and_folder_says_what_it_is_for() -> None:
    assert not [name for name, file in FILES.items() if not file.summary]
    assert not [folder for folder in folder_graph(FILES) if folder.replace("/", ".") not in FILES]


def test_every_file_has_tests_of_its_name() -> None:
    modules = [name for name, file in PRODUCT.items() if name.replace(".", "/") != file.folder]
    tests = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    named = {module: _names(module, modules) for module in modules}
    untested = [m for m in modules if tests.isdisjoint(f"test_{name.replace('.', '_')}.py" for name in named[m])]
    listed = [module for module in modules if not named[module].isdisjoint(TESTED_ELSEWHERE)]
    assert untested == listed and len(listed) == len(TESTED_ELSEWHERE), "add tests/test_<file>.py, or correct the table"
    assert set(TESTED_ELSEWHERE.values()) <= tests


def test_the_picture_is_up_to_date() -> None:
    assert make_structure.main(["--check"]) == 0, "run python docs/make_structure.py"


def test_imports_are_found_wherever_and_however_they_are_written(tmp_path: Path) -> None:
    sources = {
        "kernels/__init__.py": "",
        "kernels/dispatch.py": "",
        "kernels/attention.py": "from . import dispatch",
        "kernels/norm.py": "from .dispatch import launch\nimport torch.nn",
        "models/__init__.py": "def build():\n    import kernels.attention",
        "models/unet.py": "if TYPE_CHECKING:\n    from models import build",
        "models/parts/block.py": "from ..unet import UNet\nfrom .. import vit\nimport kernels",
    }
    assert {name: file.imports for name, file in _read(tmp_path, sources).items()} == {
        "kernels": set(),
        "kernels.dispatch": set(),
        "kernels.attention": {"kernels.dispatch"},
        "kernels.norm": {"kernels.dispatch"},
        "models": {"kernels.attention"},
        "models.unet": {"models"},
        "models.parts.block": {"models.unet", "models", "kernels"},
    }


def test_a_circle_is_named_and_nothing_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _read(tmp_path, {"engine/run.py": "import models.unet", "models/unet.py": "", "models/vit.py": "import engine.run"})
    assert make_structure.main(["--root", str(tmp_path), "--svg", str(tmp_path / "picture.svg")]) == 1
    assert "circle: engine -> models -> engine" in capsys.readouterr().err
    assert not (tmp_path / "picture.svg").exists()


def test_a_circle_is_named_in_the_order_of_its_imports() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    circle = find_circle(graph)
    assert len(circle) == 4 and all(after in graph[name] for name, after in zip(circle, circle[1:]))


def test_floors_are_the_files_in_the_longest_chain() -> None:
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}) == {"a": 3, "b": 2, "c": 1, "d": 2}


def test_arrows_that_a_chain_implies_are_not_drawn() -> None:
    assert without_implied({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_another_checkout_is_counted_and_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, run = "import engine.run\n", "import engine.step\n"
    _read(tmp_path, {"launch/train.py": train, "engine/run.py": run, "engine/step.py": "\n\n"})
    before = sorted(tmp_path.rglob("*"))
    assert make_structure.main(["--root", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["engine", "2", "3", "1", "2", "1", "0"] in rows and ["product", "3", "4", "2", "3", "2", "1"] in rows
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_the_packages_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_structure.main(["--root", str(tmp_path)])
    assert f"--root {tmp_path} has none of launch" in capsys.readouterr().err


def test_a_picture_out_of_date_fails_the_check(tmp_path: Path) -> None:
    _read(tmp_path, {"launch/train.py": '"""Train a < b."""'})
    args = ["--root", str(tmp_path), "--svg", str(tmp_path / "picture.svg")]
    assert make_structure.main([*args, "--check"]) == 1
    assert make_structure.main(args) == 0
    assert make_structure.main([*args, "--check"]) == 0
    assert "Train a < b" in [element.text for element in ElementTree.parse(tmp_path / "picture.svg").iter()]
    (tmp_path / "launch" / "predict.py").touch()
    assert make_structure.main([*args, "--check"]) == 1


def test_the_picture_names_every_file_and_folder() -> None:
    texts = {element.text for element in ElementTree.fromstring(make_structure.draw(PRODUCT)).iter()}
    modules = {name.rpartition(".")[2] for name, file in PRODUCT.items() if name.replace(".", "/") != file.folder}
    assert texts >= modules | {f"{folder}/" for folder in folder_graph(PRODUCT)}


def test_an_arrow_passes_beside_the_folders_between_its_ends() -> None:
    graph = {"launch": {"engine"}, "engine": {"models", "pipelines"}, "models": {"kernels"}, "pipelines": set()}
    arrows, boxes = make_structure.arrange(graph | {"kernels": set()}, dict.fromkeys([*graph, "kernels"], 3))
    lane = boxes["pipelines/|3"]
    assert ["engine", "pipelines/|3", "pipelines"] in arrows
    assert boxes["engine"].y < lane.y == boxes["models"].y < boxes["pipelines"].y == boxes["kernels"].y
    assert lane.x < boxes["models"].x or lane.x > boxes["models"].x + boxes["models"].width
    assert lane.height == boxes["models"].height

"""`docs/tutorial.md` holds what its code prints and draws, and everything that it names is there.

Its Python runs as it stands, up to training with the page's own settings; the commands that train are read by their own
parsers, and leave a network that has learned nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from engine.config import Config, make_parser, parse_config, to_dict
from engine.network import ModelConfig, make_model
from engine.reports.comparison import FinishedRun
from engine.reports.pictures import COLOURS
from engine.weights_file import WeightsFile
from launch import compare
from models import NETWORKS
from pipelines.layouts.labels import CODINGS
from pipelines.layouts.names import MODALITIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
PICTURES = PAGE.with_suffix("")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
LARGEST_PICTURE = 150_000  # bytes


def _load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_tutorial", ROOT / "docs" / "make_tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = _load_maker()


def untrained(command: str, trained: bool = True) -> str:
    """Read a command of the page as its program does; leave what the blocks after it need."""
    program, script, *args = shlex.split(command)
    assert program == "python" and (ROOT / script).is_file()
    if script.endswith("train.py"):
        config = parse_config(make_parser(""), args)[0]
        if trained:
            _save_untrained(config)
    else:
        assert script.endswith("compare.py")
        with pytest.MonkeyPatch.context() as patch:
            planned: list[Path] = []
            patch.setattr(compare, "train_all", lambda runs, launcher: planned.extend(runs))
            patch.setattr(FinishedRun, "read", lambda path: path)
            patch.setattr(compare, "compare", lambda *_: None)
            assert compare.main(args) == 0
            assert len(planned) == len([name for name, network in NETWORKS.items() if network.published])
        if trained:
            (planned[0].parent / "table.md").write_text("| model |\n\nNot comparable")
    return ""


def _save_untrained(config: Config) -> None:
    assert config.run_dir is not None
    small = replace(config, model=ModelConfig("unet", feature_size=2), run_dir=None)
    coding = CODINGS["decathlon"]
    weights = make_model(small.model, small.data.crop_size_voxels, len(MODALITIES)).state_dict()
    file = WeightsFile(weights, to_dict(small), 1, {"mean": 0.0}, MODALITIES, coding, {})
    file.write(config.run_dir / "checkpoints" / "best.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder for this file: what a checkout has, and nothing yet of what the page makes."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "launch").symlink_to(ROOT / "launch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GLIOFORGE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def made(folder: Path) -> str:
    """The page as its code makes it."""
    return maker.run_page(PAGE.read_text(), untrained)


def around_training(page: str) -> str:
    """What does not depend on a trained network."""
    before, rest = page.split("\n## Training\n")
    return before + rest.split("\n## The published experiment\n")[1]


@pytest.mark.filterwarnings("ignore:regions 'tutorial'")
def test_the_code_prints_what_the_page_says(made: str) -> None:
    page = around_training(PAGE.read_text())
    made = around_training(made)
    assert NUMBER.sub("#", made) == NUMBER.sub("#", page)
    for found, said in zip(NUMBER.findall(made), NUMBER.findall(page)):
        # A decimal may differ in its last places between processors.
        assert float(found) == pytest.approx(float(said), rel=5e-3 if "." in said else 0), (found, said)


def test_the_sample_is_drawn_as_the_page_shows_it(made: str, folder: Path) -> None:
    found, shown = (matplotlib.image.imread(path / "sample.png")[..., :3] for path in (folder / maker.WORK, PICTURES))
    assert found.shape == shown.shape
    assert np.abs(found - shown).mean() < 0.02


def test_commands_that_do_not_run_have_existing_options(folder: Path) -> None:
    shown = [block["code"] for block in maker.BLOCK.finditer(PAGE.read_text()) if block["kept"]]
    commands = [line for code in shown for line in code.splitlines() if line.startswith("python ")]
    assert commands
    for command in commands:
        untrained(command, trained=False)
    targets = [line.split()[1] for code in shown for line in code.splitlines() if line.startswith("make ")]
    assert targets and all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)


def test_every_picture_is_linked_and_small() -> None:
    linked = set(maker.PICTURE.findall(PAGE.read_text()))
    assert linked == {str(path.relative_to(PICTURES)) for path in PICTURES.rglob("*") if path.is_file()}
    assert all((PICTURES / name).stat().st_size < LARGEST_PICTURE for name in linked)


@pytest.mark.parametrize("name", sorted(set(maker.PICTURE.findall(PAGE.read_text()))))
def test_pictures_keep_the_colours_of_their_legends(name: str) -> None:
    regions, networks = COLOURS.values(), [network.colour for network in NETWORKS.values() if network.published]
    pixels = matplotlib.image.imread(PICTURES / name)[..., :3]
    for colour in networks if name == "curves.png" else regions:
        assert np.abs(pixels - np.array(to_rgb(colour), np.float32)).max(axis=-1).min() < 0.03, colour


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGE.parent.glob("*.md"))])
def test_links_between_files_have_targets(page: Path) -> None:
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_the_readme_and_the_page_link_each_other() -> None:
    assert "docs/tutorial.md" in LINK.findall((ROOT / "README.md").read_text())
    assert "../README.md" in LINK.findall(PAGE.read_text())


def test_the_page_has_no_times_or_folders_of_a_machine() -> None:
    text = PAGE.read_text()
    assert not maker.TIME.search(text) and not maker.TIMED_LINE.search(text)
    assert not re.search(r"(?<![\w.~])/(?:tmp|root|home|work|Users|private|var)/", text)


# ---------- the command


BLOCKS = """\
```python
print(6 * 7)
```

```text
old
```

<!-- not run -->
```python
raise ValueError
```

```python
print("| a |")
```

<!-- output -->

old

<!-- end of output -->

```sh
count
```

```text
```
"""


def test_new_outputs_replace_old_ones() -> None:
    made = maker.run_page(BLOCKS, lambda command: f"ran {command}")
    assert "```text\n42\n```" in made and "<!-- output -->\n\n| a |\n\n<!-- end of output -->" in made
    assert "```text\nran count\n```" in made and "old" not in made
    assert maker.run_page(made, lambda command: f"ran {command}") == made


def test_a_block_whose_output_has_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tutorial.md, line 4: the block prints, and no text block follows it:\n1"):
        maker.run_page("one\n\n```python\nprint(1)\n```\n", str)


def test_an_error_names_its_line_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        maker.run_page("one\n\n```python\na = 0\n1 / a\n```\n", str)
    assert (caught.traceback[-1].frame.code.path, caught.traceback[-1].lineno + 1) == ("tutorial.md", 5)


def test_a_clean_folder_changes_the_process_only_while_it_is_used() -> None:
    before = Path.cwd(), dict(os.environ)
    with maker.clean_folder() as folder:
        assert Path.cwd() == folder.resolve() and os.environ["GLIOFORGE_CACHE"] == str(folder / "cache")
    assert (Path.cwd(), dict(os.environ)) == before


def test_times_are_removed_from_what_a_command_prints() -> None:
    lines = ["prepared 5 cases in 10.1 s: x", "step 8/640  loss 1.016  0.27 samples/s  79 min left",
             "epoch 4/20  loss 0.826  Dice 10.4  44.87 samples/s"]  # fmt: skip
    printed = maker.run_shell("printf '%s\\n' " + " ".join(map(shlex.quote, lines)))
    assert printed == "prepared 5 cases in ... s: x\nepoch 4/20  loss 0.826  Dice 10.4  ... samples/s\n"


def test_folders_of_the_machine_become_those_of_a_reader(tmp_path: Path) -> None:
    printed = f"prepared: {tmp_path}/cache/store, report: {tmp_path}/runs/tutorial/report.html"
    said = "prepared: ~/.cache/glioforge/store, report: runs/tutorial/report.html"
    assert maker.without_folders(printed, tmp_path) == said


def test_only_linked_pictures_are_copied(tmp_path: Path) -> None:
    drawn, kept = tmp_path / "drawn", tmp_path / "kept"
    for name in ("run/a.png", "b.png"):
        (drawn / name).parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(drawn / name, np.random.default_rng(0).random((64, 64, 3)))
    kept.mkdir()
    (kept / "gone.png").touch()
    maker.copy_pictures("![A picture](tutorial/run/a.png) and [a link](tutorial/b.png)", drawn, kept)
    assert [path for path in kept.rglob("*") if path.is_file()] == [kept / "run" / "a.png"]
    found, shown = (matplotlib.image.imread(path / "run" / "a.png")[..., :3] for path in (drawn, kept))
    assert 0 < np.abs(found - shown).mean() < 0.1  # fewer colours, the same picture
    with pytest.raises(FileNotFoundError):
        maker.copy_pictures("![A picture](tutorial/none.png)", drawn, kept)

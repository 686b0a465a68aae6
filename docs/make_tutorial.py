"""Run the code of `docs/tutorial.md`, and put what it prints and draws into the page.

python docs/make_tutorial.py                                   some minutes on two CPU cores

The page is its own source. A `python` block runs in this process, in one namespace with those before it; an `sh` block
in a shell; one after `<!-- not run -->` not at all. What a block prints goes into the `text` block that follows it, or
as Markdown between `<!-- output -->` and `<!-- end of output -->`; what a shell prints may go nowhere. A picture linked
as `tutorial/NAME.png` is what the blocks drew as `runs/tutorial/NAME.png`.

Everything runs from the start, in a folder that is removed afterwards. One thread computes, and nothing that depends on
the machine's speed is printed, so the same machine and versions give the same page, byte for byte; another processor
may round differently, and so end at another Dice.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
WORK = Path("runs") / "tutorial"
COLOURS = 256  # of a picture; half the bytes
BLOCK = re.compile(
    r"^(?P<kept><!-- not run -->\n)?```(?P<language>python|sh)\n(?P<code>.*?)^```\n"
    r"(?P<place>\n(?:```text\n.*?^```\n|<!-- output -->\n.*?<!-- end of output -->\n))?",
    re.DOTALL | re.MULTILINE,
)
PICTURE = re.compile(r"!\[[^\]]*\]\(tutorial/(?P<name>[^)]+)\)")
TIMED_LINE = re.compile(r"^step \d+/\d+ .* left\n", re.MULTILINE)  # only on a slow machine
TIME = re.compile(r"\d[\d.]*(?= samples/s)|(?<=cases in )\d[\d.]*(?= s)")

Shell = Callable[[str], str]
"""From a command to what it prints."""


def run_page(page: str, shell: Shell) -> str:
    """The page with what its blocks print, run in order in the current folder.

    Args:
        page: Markdown, see the head of this file. shell: runs the `sh` blocks.

    Raises:
        ValueError: a Python block prints, and the page has no place for it.
        Exception: whatever a block raises.
    """
    namespace: dict[str, Any] = {"__name__": "tutorial"}

    def run(block: re.Match[str]) -> str:
        if block["kept"]:
            return block[0]
        line = page.count("\n", 0, block.start()) + 2
        if block["language"] == "sh":
            output = shell(block["code"])
        else:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                lines = "\n" * (line - 1) + block["code"]  # an error then names a line of the page
                exec(compile(lines, PAGE.name, "exec"), namespace)
            output = printed.getvalue()
        place = block["place"]
        if place is None:
            if output and block["language"] == "python":
                raise ValueError(f"{PAGE.name}, line {line}: the block prints, and no text block follows it:\n{output}")
            return block[0]
        head = block[0].removesuffix(place)
        if place.startswith("\n```"):
            return f"{head}\n```text\n{output.strip()}\n```\n"
        return f"{head}\n<!-- output -->\n\n{output.strip()}\n\n<!-- end of output -->\n"

    return BLOCK.sub(run, page)


def run_shell(command: str) -> str:
    """What a command prints, without times.

    Raises:
        subprocess.CalledProcessError: it failed; its output is on standard error.
    """
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    done.check_returncode()
    return TIME.sub("...", TIMED_LINE.sub("", done.stdout))


@contextlib.contextmanager
def clean_folder() -> Iterator[Path]:
    """A folder like the root of a fresh checkout, as the current folder while the page runs."""
    before, environment = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "launch").symlink_to(ROOT / "launch")
        os.environ |= {
            "GLIOFORGE_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)


def without_folders(page: str, folder: Path) -> str:
    """The page with the paths that a reader would see."""
    return page.replace(str(folder / "cache"), "~/.cache/glioforge").replace(f"{folder}/", "")


def copy_pictures(page: str, source: Path, target: Path) -> None:
    """Copy the pictures that a page links, and no others, with few colours.

    Raises:
        FileNotFoundError: a picture that no block drew.
    """
    from PIL import Image  # comes with matplotlib

    shutil.rmtree(target, ignore_errors=True)
    for name in dict.fromkeys(PICTURE.findall(page)):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source / name) as picture:
            # Of Pillow's methods, this one keeps the colours of few pixels, such as a legend's.
            few = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(path, optimize=True)
        print(f"{name}  {path.stat().st_size / 1000:.0f} kB")


def main() -> int:
    """Rewrite the page and its pictures, once all of it has run."""
    with clean_folder() as folder:
        sys.path.insert(0, str(ROOT))
        page = without_folders(run_page(PAGE.read_text(), run_shell), folder)
        copy_pictures(page, WORK, PAGE.with_suffix(""))
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

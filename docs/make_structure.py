"""Count the folders, files and imports of the source, and draw which folder imports which.

python docs/make_structure.py                  print the counts, draw docs/structure.svg
python docs/make_structure.py --check          draw nothing; status 1 if the picture is out of date
python docs/make_structure.py --root FOLDER    count another checkout; --svg FILE draws it

An arrow leads from a file to a file that it imports, whether at the top, in a function or under `TYPE_CHECKING`; two
folders have an arrow between them if any of their files have. Floors are the files in the longest chain of imports.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Collection, Mapping
from graphlib import CycleError, TopologicalSorter
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "structure.svg"
PACKAGES = ("launch", "engine", "pipelines", "models", "kernels")
USERS = ("benchmarks",)  # counted, not drawn
WIDTH, GAP, PAD, LINE = 960, 40, 12, 17  # of the picture, in pixels
HEAD = f"""<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} %d'>
<style>
  text {{ font: 11px sans-serif; fill: #57606a }} .file {{ font: 11px monospace; fill: #1f2328 }}
  .folder {{ font: bold 14px monospace; fill: #1f2328 }} rect {{ fill: #f6f8fa; stroke: #8c959f }}
  .page {{ fill: white; stroke: none }} polyline {{ fill: none; stroke: #0969da; stroke-width: 1.5 }}
</style>
<marker id='head' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='6' markerHeight='6' orient='auto'>
  <path d='M0 0L8 4L0 8z' fill='#0969da'/>
</marker>
<rect class='page' width='100%%' height='100%%'/>"""
LETTER = {"folder": 8.6, "file": 6.8, "summary": 6.1}  # widths in pixels

Graph = Mapping[str, Collection[str]]
"""From each name to the names that it imports."""


class File(NamedTuple):
    """One module."""

    folder: str  # such as "engine/reports"
    lines: int
    summary: str  # the first line of its docstring
    imports: set[str]  # names of modules


class Box(NamedTuple):
    """A rectangle of the picture, in pixels; y grows downwards."""

    x: float
    y: float
    width: float
    height: float
    columns: int = 0  # of files

    def nearest(self, x: float) -> float:
        """The place on its upper or lower side that is nearest to x, away from the corners."""
        inset = min(PAD, self.width / 2)
        return min(max(x, self.x + inset), self.x + self.width - inset)


def read_files(root: Path) -> dict[str, File]:
    """The modules of a checkout by dotted name; a package's own name is its `__init__`."""
    found = sorted(path for package in (*PACKAGES, *USERS) for path in (root / package).rglob("*.py"))
    names = [path.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__") for path in found]
    paths = {name.replace("/", "."): path for name, path in zip(names, found)}
    files = {}
    for name, path in paths.items():
        text, folder = path.read_text(encoding="utf-8"), path.parent.relative_to(root).as_posix()
        tree = ast.parse(text, str(path))
        summary = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".:")
        files[name] = File(folder, text.count("\n"), summary, _imported(tree, folder.split("/"), paths) - {name})
    return files


def _imported(tree: ast.Module, package: list[str], names: Collection[str]) -> set[str]:
    """Those of `names` that a module in `package` imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= {member if member in names else source for member in members}
    return found & set(names)


def within(files: Mapping[str, File], *folders: str) -> dict[str, File]:
    """The files in some folders and in the folders below them."""
    starts = tuple(f"{folder}/" for folder in folders)
    return {name: file for name, file in files.items() if f"{file.folder}/".startswith(starts)}


def file_graph(files: Mapping[str, File]) -> dict[str, set[str]]:
    """The imports of some files among themselves."""
    return {name: file.imports & files.keys() for name, file in files.items()}


def folder_graph(files: Mapping[str, File]) -> dict[str, set[str]]:
    """The folders of some files, and which of the others each imports."""
    graph: dict[str, set[str]] = {file.folder: set() for file in files.values()}
    for name, others in file_graph(files).items():
        graph[files[name].folder] |= {files[other].folder for other in others} - {files[name].folder}
    return graph


def find_circle(graph: Graph) -> list[str]:
    """The names along a circle of imports, the first again at the end; empty if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def floors(graph: Graph) -> dict[str, int]:
    """The floor of each name: 1 if it imports none of the others, else one above the highest that it imports."""
    floor: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floor[name] = 1 + max((floor[other] for other in graph[name]), default=0)
    return floor


def count(files: Mapping[str, File]) -> dict[str, int]:
    """Sizes of some files and of the imports among them; 0 floors if they form a circle."""
    graph, folders = file_graph(files), folder_graph(files)
    return {
        "files": len(files),
        "lines": sum(file.lines for file in files.values()),
        "folders": len(folders),
        "floors": 0 if find_circle(graph) else max(floors(graph).values(), default=0),
        "arrows": sum(map(len, graph.values())),
        "arrows between folders": sum(map(len, folders.values())),
    }


def without_implied(graph: Graph) -> dict[str, set[str]]:
    """A graph without the arrows that chains of others imply."""
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        below[name] = set(graph[name]).union(*(below[other] for other in graph[name]))
    return {name: set(others) - set().union(*(below[other] for other in others)) for name, others in graph.items()}


def arrange(graph: Graph, sizes: Mapping[str, int]) -> tuple[list[list[str]], dict[str, Box]]:
    """Boxes in rows: a folder is below all that import it, as high as that allows; at the bottom if it imports nothing.

    From folders, what they import, and the number of files in each. Returns what each arrow passes, row by row: a
    folder, lanes (gaps in rows that it goes through), a folder; and the box of each folder and lane.
    """
    row_of = floors({name: {other for other in graph if name in graph[other]} for name in graph})
    row_of |= {name: max(row_of.values()) for name, others in graph.items() if not others}
    arrows = []
    for name, other in sorted((name, other) for name, others in graph.items() for other in others):
        lanes = {f"{other}/|{row}": row for row in range(row_of[name] + 1, row_of[other])}
        row_of |= lanes
        arrows.append([name, *lanes, other])
    boxes: dict[str, Box] = {}

    def place(name: str) -> tuple[float, int, str]:  # below the middle of what leads to it
        above = [boxes[arrow[arrow.index(name) - 1]].nearest(WIDTH / 2) for arrow in arrows if name in arrow[1:]]
        return sum(above) / max(1, len(above)), PACKAGES.index(name.split("/")[0]), name

    y = float(PAD)
    for row in range(1, max(row_of.values()) + 1):
        names = sorted((name for name in row_of if row_of[name] == row), key=place)
        folders = [name for name in names if name in graph]
        columns = 2 if len(folders) == 1 else 1
        height = (2 - -max(sizes[name] for name in folders) // columns) * LINE + PAD
        width = (WIDTH - PAD * (len(names) + 1)) / len(folders)
        x = float(PAD)
        for name in names:
            boxes[name] = Box(x, y, width if name in graph else 0, height, columns)
            x += boxes[name].width + PAD
        y += height + GAP
    return arrows, boxes


def draw(files: Mapping[str, File]) -> str:
    """The folders of some files as SVG, each above those that it imports; arrows that others imply are not drawn."""
    graph = without_implied(folder_graph(files))
    summaries: dict[str, dict[str, str]] = {folder: {} for folder in graph}
    about = dict.fromkeys(graph, "")
    for name, file in files.items():
        if name.replace(".", "/") == file.folder:  # its __init__
            about[file.folder] = file.summary
        else:
            summaries[file.folder][name.rpartition(".")[2]] = file.summary
    arrows, boxes = arrange(graph, {folder: len(inside) for folder, inside in summaries.items()})
    shapes: list[str] = sum((_draw_folder(name, about[name], summaries[name], boxes[name]) for name in graph), [])
    for first, *lanes, last in ([boxes[name] for name in arrow] for arrow in arrows):
        points = [(first.nearest([*lanes, last][0].nearest(WIDTH / 2)), first.y + first.height)]
        points += [(lane.x, y) for lane in lanes for y in (lane.y, lane.y + lane.height)]
        points += [(last.nearest(points[-1][0]), last.y)]
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        shapes.append(f"<polyline points='{line}' marker-end='url(#head)'/>")
    bottom = max(box.y + box.height for box in boxes.values()) + PAD
    return "\n".join([HEAD % bottom, *shapes, "</svg>\n"])


def _draw_folder(folder: str, about: str, summaries: Mapping[str, str], box: Box) -> list[str]:
    x, rows, longest = box.x + PAD, -(-len(summaries) // box.columns), max(map(len, summaries), default=0)
    width = (box.width - 2 * PAD) / box.columns
    shapes = [f"<rect x='{box.x:.0f}' y='{box.y:.0f}' width='{box.width:.0f}' height='{box.height:.0f}' rx='6'/>"]

    def write(kind: str, name: str, about: str, column: int, row: float, room: float, letters: int) -> None:
        """A name and, after room for so many letters, as much of what it is about as fits."""
        start, y = letters * LETTER[kind] + PAD, box.y + row * LINE
        text = shorten(about, int((room - start) / LETTER["summary"]), placeholder=" ...")
        shapes.append(f"<text x='{x + column * width:.0f}' y='{y:.0f}' class='{kind}'>{escape(name)}</text>")
        shapes.append(f"<text x='{x + column * width + start:.0f}' y='{y:.0f}'>{escape(text)}</text>")

    write("folder", f"{folder}/", about, 0, 1.4, box.width - 2 * PAD, len(folder) + 1)
    for index, (name, summary) in enumerate(sorted(summaries.items())):
        write("file", name, summary, index // rows, 2.6 + index % rows, width, longest)
    return shapes


def main(args: list[str] | None = None) -> int:
    """Print the counts; draw the picture, or check it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="checkout to count, instead of the one of this file")
    parser.add_argument("--check", action="store_true", help="compare with the picture instead of drawing it")
    parser.add_argument("--svg", type=Path, help="file of the picture")
    options = parser.parse_args(args)
    files = read_files(options.root or ROOT)
    if not files:
        parser.error(f"--root {options.root} has none of {', '.join(PACKAGES)}; give the top folder of a checkout")
    counts = {folder: count(within(files, folder)) for folder in sorted(folder_graph(files))}
    counts |= {"product": count(within(files, *PACKAGES)), "product and benchmarks": count(files)}
    columns = list(counts["product"])
    print(" " * 24 + "".join(f"{column:>{len(column) + 3}}" for column in columns))
    for name, numbers in counts.items():
        print(f"{name:24}" + "".join(f"{numbers[column]:>{len(column) + 3},}" for column in columns))
    if circle := find_circle(file_graph(files)) or find_circle(folder_graph(files)):
        print(f"imports form a circle: {' -> '.join(circle)}", file=sys.stderr)
        return 1
    path = options.svg or (None if options.root else PICTURE)
    picture = draw(within(files, *PACKAGES))
    if path and not options.check:
        path.write_text(picture, encoding="utf-8")
    elif path and (not path.is_file() or path.read_text(encoding="utf-8") != picture):
        print(f"{path} is out of date: run python docs/make_structure.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

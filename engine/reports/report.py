"""The page that people keep of a run: `report.html`, one file without links or scripts.

It holds the Dice table, the pictures, the data, every validation case, timing, environment and configuration, and is
made to be read on a screen, on a phone and on paper.
"""

from __future__ import annotations

import base64
import html
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.config import Config, to_dict
from engine.metrics import CaseDice
from engine.progress import percent
from engine.ranks.distributed import Ranks
from pipelines.basics.atomic import write_text
from pipelines.basics.text import printable
from pipelines.labels import REGIONS, Coding

END = "</body></html>\n"
ROOT = Path(__file__).resolve().parents[2]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2, p, summary, figcaption { overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem }
img { max-width: 100% }
figure { margin: 1rem 0; max-width: 36rem }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem }
.scroll { overflow-x: auto }
pre { overflow-x: auto; background: #f5f5f5; padding: 1rem; font-size: .8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { padding-left: 0; text-align: left }
.facts th, .facts td { text-align: left; vertical-align: top; overflow-wrap: anywhere }
.facts th { white-space: nowrap; font-weight: normal; color: #555 }
.note, figcaption { color: #555; font-size: .9rem }
summary { cursor: pointer; margin: .75rem 0 }
@media (max-width: 30rem) {
  th, td { padding: .3rem .25rem }
  table { font-size: .85rem }
  details table { font-size: .72rem }
  details th, details td { padding: .3rem .15rem }
  h1 { font-size: 1.4rem }
}
@media print {
  body { margin: 0; max-width: none; font-size: 10pt }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: none; padding: 0 }
  .scroll { overflow: visible }
  .grid { display: block }
  .grid figure { display: inline-block; width: 48%; vertical-align: top }
  figure, tr { break-inside: avoid }
  img { max-height: 22cm }
  h2, h2 + .note, summary, figcaption { break-after: avoid }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""


@dataclass(frozen=True)
class Facts:
    """What the page says of a run, beside its pictures.

    Attributes:
        config: of the run. summary: as in `metrics.json`. history: rows of `log.csv`, in order of epoch.
        cases: of the last validation. epoch_samples: crops of an epoch on all ranks.
        train, val: names of the cases. modalities: in the order of the channels. coding: of the labels.
        environment: what the run was computed with, by name.
    """

    config: Config
    summary: dict[str, Any]
    history: Sequence[Mapping[str, Any]]
    cases: Sequence[CaseDice]
    epoch_samples: int
    train: Sequence[str]
    val: Sequence[str]
    modalities: Sequence[str]
    coding: Coding
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """Pictures of the page.

    Attributes:
        title: above them. pictures: name of a PNG file in the run's folder -> what it shows. note: on all of them.
    """

    title: str
    pictures: Mapping[str, str]
    note: str = ""


def write_html(run_dir: Path, facts: Facts, sections: Sequence[Section]) -> Path:
    """Write `report.html` into the run's folder, which holds the pictures."""
    title = f"glioforge: {run_dir.resolve().name}"
    summary = facts.summary
    rest = (
        ("Data", _facts(_data(facts)) + _names("training cases", facts.train) + _names("validation cases", facts.val)),
        ("Timing", _facts(timing(facts.history, facts.epoch_samples))),
        ("Environment", _facts(facts.environment)),
        ("Configuration", f"<pre>{_escape(_as_yaml(facts.config))}</pre>"),
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{_escape(title)}</h1>
{_dice_table(summary)}
{_note(f"{summary['definition']}. Validated on: {summary['validated_on'].replace('_', ' ')}.")}
{_case_table(facts.cases, summary["last"]["epoch"])}
{"".join(_pictures(run_dir, section) for section in sections if section.pictures)}
{"".join(f"<h2>{heading}</h2>{content}" for heading, content in rest)}
{_note(f"Written {time.strftime('%Y-%m-%d %H:%M')}.")}
{END}"""
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def is_whole(page: Path) -> bool:
    """Whether a page is there from its beginning to its end."""
    if not page.is_file():
        return False
    with page.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(END)))
        return file.read() == END.encode()


def mean_dice(case: CaseDice) -> float | None:
    """Mean over the regions that the case's truth has; None where it has none."""
    known = [dice for dice in case.dice() if not math.isnan(dice)]
    return sum(known) / len(known) if known else None


def best_and_worst(cases: Iterable[CaseDice], count: int = 2) -> tuple[list[CaseDice], list[CaseDice]]:
    """At most `count` cases of highest Dice, and as many others of lowest, the extreme ones first.

    A case without a tumour has no Dice and is in neither.
    """
    scored = [(mean_dice(case), case) for case in cases]
    known = sorted(((dice, case) for dice, case in scored if dice is not None), key=lambda pair: -pair[0])
    ranked = [case for _, case in known]
    return ranked[:count], ranked[count:][: -count - 1 : -1]


def timing(history: Sequence[Mapping[str, Any]], epoch_samples: int) -> dict[str, str]:
    """How long training and validation took, by name.

    Args:
        history: rows of `log.csv`, in order of epoch. epoch_samples: crops of an epoch on all ranks.
    """
    rates = [row["samples_per_s"] for row in history if row["samples_per_s"] > 0]  # 0: resumed behind the last step
    seconds = [epoch_samples / rate for rate in rates]
    validations = [row["val_seconds"] for row in history if "val_seconds" in row]
    waited = sum(row["data_wait"] * epoch_samples / row["samples_per_s"] for row in history if row["samples_per_s"] > 0)
    skipped = sum(row["skipped_steps"] for row in history)
    steps = f"{history[-1]['step']:,}"
    told = {"epochs": str(len(history)), "steps": f"{steps} ({skipped} skipped)" if skipped else steps}
    if rates:
        first = f" (the first {seconds[0]:,.1f} s)" if len(rates) > 1 else ""
        told["training"] = f"{statistics.median(seconds):,.1f} s per epoch{first}"
        told["samples"] = f"{statistics.median(rates):.2f} crops per second on all ranks"
        told["waiting for data"] = f"{100 * waited / sum(seconds):.1f} % of the training time"
    if validations:
        told["validation"] = f"{statistics.median(validations):,.1f} s each, {len(validations)} times"
    told["together"] = _clock(sum(seconds) + sum(validations))
    return told


def environment(config: Config, ranks: Ranks, kernels: str) -> dict[str, str]:
    """What a run is computed with, by name.

    Args:
        config: of the run. ranks: who this process is. kernels: what `dispatch.use` said of the paths taken.
    """
    train = config.train
    versions = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        "Triton": _version("triton"),
        "MONAI": _version("monai"),
        "DALI": _version("nvidia-dali-cuda"),
        "DeepSpeed": _version("deepspeed"),
        "glioforge": _version("glioforge"),
    }
    nodes = "one node" if ranks.ranks_on_node == ranks.world_size else f"{ranks.ranks_on_node} of them on this node"
    return {
        "device": _device_name(ranks.device),
        "ranks": "1" if ranks.world_size == 1 else f"{ranks.world_size}, {nodes}",
        "kernels": kernels.removeprefix("kernels: "),
        "precision": train.precision,
        "ZeRO stage": str(train.zero_stage),
        "seed": str(train.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": _commit(),
        "system": platform.platform(),
    }


def _data(facts: Facts) -> dict[str, str]:
    data, coding = facts.config.data, facts.coding
    crop = " x ".join(map(str, data.crop_size_voxels))
    fold = f" (fold {data.fold} of {data.folds}, counted from 0)" if data.folds else ""
    tissues = ", ".join(f"{value} {tissue}" for value, tissue in sorted(coding.tissues.items()))
    regions = ", ".join(
        f"{region} {' + '.join(map(str, values))}" for region, values in zip(REGIONS, coding.regions, strict=True)
    )
    return {
        "scans": data.root.resolve().name if data.root else "synthetic",
        "cases": f"{len(facts.train)} to train on, {len(facts.val)} to validate on{fold}",
        "modalities": ", ".join(facts.modalities),
        "spacing": f"{' x '.join(f'{mm:g}' for mm in data.spacing_mm)} mm",
        "crop": f"{crop} voxels",
        "labels": f"{coding.release}: {tissues}",
        "regions": f"{regions} (label values)",
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} thread(s)"
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}, {threads}"


def _version(prefix: str) -> str | None:
    """Version of the installed distribution of that name, or whose name goes on with the version of CUDA."""
    for found in metadata.distributions():
        name = (found.metadata["Name"] or "").lower()
        if name == prefix or name.removeprefix(prefix).isdigit():
            return found.version
    return None


def _commit() -> str:
    """Of the checkout that the program runs from, or else `GLIOFORGE_COMMIT`."""
    commit = ""
    if (ROOT / ".git").exists():  # installed elsewhere, git would tell of a repository around it
        command = ["git", "describe", "--always", "--dirty"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = ""
    return commit or os.environ.get("GLIOFORGE_COMMIT") or "unknown"


def _as_yaml(config: Config) -> str:
    """An option on a line; without the run's folder, as in `config.yaml`."""
    values = {name: value for name, value in to_dict(config).items() if name not in ("run_dir", "resume")}
    return yaml.dump(values, Dumper=_Lines, sort_keys=False)


class _Lines(yaml.SafeDumper):
    """YAML with a line for each value, lists included."""


_Lines.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _dice_table(summary: dict[str, Any]) -> str:
    def row(title: str, scores: dict[str, Any]) -> str:
        if scores["epoch"] is None:
            return ""
        cells = "".join(f"<td>{percent(scores.get(name))}</td>" for name in ("mean", *REGIONS))
        return f"<tr><td>{title}, epoch {scores['epoch']}</td>{cells}<td>{scores.get('cases', 0)}</td></tr>"

    empty = [
        f"{region}: {count} of the cases have none; false positives in {summary['last']['false_positives'][region]}"
        for region, count in summary["last"].get("empty_truths", {}).items()
        if count
    ]
    head = "".join(f"<th>{name}</th>" for name in ("mean", *REGIONS))
    return (
        f'<div class="scroll"><table><tr><th>Dice (%)</th>{head}<th>cases</th></tr>'
        f"{row('best', summary['best'])}{row('last', summary['last'])}</table></div>"
        f"{_note('; '.join(empty))}"
    )


def _case_table(cases: Sequence[CaseDice], epoch: int) -> str:
    """Every case of the last validation, the worst first; those without a tumour last."""
    if not cases:
        return ""

    def row(case: CaseDice) -> str:
        dice = [mean_dice(case), *(None if math.isnan(value) else value for value in case.dice())]
        cells = [*map(percent, dice), *(f"{voxels:,}" for voxels in case.truth)]
        return f"<tr><td>{_escape(case.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

    def worst_first(case: CaseDice) -> float:
        mean = mean_dice(case)
        return math.inf if mean is None else mean

    head = "".join(f"<th>{name}</th>" for name in ("mean", *REGIONS, *(f"{region} voxels" for region in REGIONS)))
    rows = "".join(map(row, sorted(cases, key=worst_first)))
    return (
        f"<details><summary>Dice (%) of each case after epoch {epoch}, the worst first</summary>"
        f'<div class="scroll"><table><thead><tr><th>case</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{_note('Voxels are those of the truth.')}</details>"
    )


def _pictures(run_dir: Path, section: Section) -> str:
    figures = "".join(
        f'<figure><figcaption>{_escape(caption)}</figcaption><img alt="{_escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode((run_dir / name).read_bytes()).decode()}"></figure>'
        for name, caption in section.pictures.items()
    )
    return f'<h2>{_escape(section.title)}</h2>{_note(section.note)}<div class="grid">{figures}</div>'


def _facts(told: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_escape(name)}</th><td>{_escape(text)}</td></tr>' for name, text in told.items()
    )
    return f'<table class="facts">{rows}</table>'


def _names(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"<details><summary>{len(names)} {title}</summary><p>{_escape(', '.join(names))}</p></details>"


def _note(text: str) -> str:
    return f'<p class="note">{_escape(text)}</p>' if text else ""


def _escape(text: str) -> str:
    return html.escape("\n".join(map(printable, text.split("\n"))))

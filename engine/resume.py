"""What resuming a run will do, logged before anything is done: the run folder may be somebody else's.

Its `config.yaml` decides, as in any run, and may have been changed since the checkpoint was written.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.config import Config, to_portable_dict
from pipelines.basics.atomic import below
from pipelines.basics.text import printable

log = logging.getLogger(__name__)

WRITTEN = ("checkpoints", "logs", "tensorboard", "run.log", ".lock")
"""Folders that a run writes to, and files that it appends to; all others it replaces."""


def refuse_links(run_dir: Path) -> None:
    """Refuse a run folder in which a link would have the run write somewhere else.

    Raises:
        ValueError: naming the link.
    """
    for name in WRITTEN:
        below(run_dir, name)
        if name in ("logs", "tensorboard") and (run_dir / name).is_dir():
            for path in sorted((run_dir / name).iterdir()):
                below(run_dir, name, path.name)


def log_effects_of_resuming(config: Config) -> None:
    """Log how the configuration differs from that of the newest checkpoint, and what it writes elsewhere."""
    assert config.run_dir is not None
    recorded = checkpoint.recorded_config(config.run_dir / "checkpoints")
    for line in changed_options(recorded, to_portable_dict(config)) if recorded else ():
        log.warning("--resume: %s", printable(line))
    for line in written_elsewhere(config):
        log.warning("--resume: outside its folder, this run %s", printable(line))


def changed_options(was: Any, now: Any, name: str = "") -> list[str]:
    """A line for each option that differs between two configurations from `to_portable_dict`."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = dict.fromkeys([*now, *was])
        prefix = f"{name}." if name else "--"
        return [line for key in names for line in changed_options(was.get(key), now.get(key), f"{prefix}{key}")]
    return [] if was == now else [f"{name} is {now}, and was {was} when the checkpoint was written"]


def written_elsewhere(config: Config) -> list[str]:
    """What a run of this configuration makes outside its own folder, where it is not there yet."""
    data, found = config.data, []
    if data.store_dir is not None:
        found.append(f"writes prepared volumes to {data.store_dir} (--data.store_dir)")
    if data.download:
        found.append(f"downloads 7.1 GB to {data.root} (--data.download true)")
    elif data.root is None:
        found.append(f"makes {data.phantom.cases} synthetic scans in the cache (no --data.root)")
    return found

"""What going on with a run comes to, before anything is done: a run folder may be somebody else's.

Its `config.yaml` says what to do, as in any run, and may have been changed since the checkpoint was written.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.config import Config, to_portable_dict
from pipelines.atomic import below
from pipelines.text import printable

log = logging.getLogger(__name__)

WRITTEN = ("checkpoints", "logs", "tensorboard", "run.log", ".lock")
"""Folders that a run writes to, and files that it adds to; all others it replaces."""


def refuse_links(run_dir: Path) -> None:
    """Refuse a run folder from which a link leads out to where the run would write.

    Raises:
        ValueError: naming the link.
    """
    for name in WRITTEN:
        below(run_dir, name)
        if name in ("logs", "tensorboard") and (run_dir / name).is_dir():
            for path in sorted((run_dir / name).iterdir()):
                below(run_dir, name, path.name)


def tell_what_resuming_does(config: Config) -> None:
    """Log in what the configuration differs from that of the newest checkpoint, and what it writes elsewhere."""
    assert config.run_dir is not None
    recorded = checkpoint.recorded_config(config.run_dir / "checkpoints")
    for line in changed_options(recorded, to_portable_dict(config)) if recorded else ():
        log.warning("--resume: %s", printable(line))
    for line in written_elsewhere(config):
        log.warning("--resume: beside its folder, this run %s", printable(line))


def changed_options(was: Any, now: Any, name: str = "") -> list[str]:
    """Options that differ between two configurations, as `to_portable_dict` gives them, a line each."""
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

"""Libraries that take long to import, imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """Stands for a module: `fn = Lazy("nvidia.dali.fn")`, and `fn.resize` imports it.

    Args:
        name: of the module, with its packages.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of any object, e.g. by jsonargparse of whatever is next to a dataclass
            raise AttributeError(name)
        return getattr(import_module(self._name), name)

"""A lazy module is imported when something in it is asked for, and not before."""

from __future__ import annotations

import sys

import pytest

from pipelines.basics.lazy import Lazy


def test_a_module_is_imported_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "xml.sax.saxutils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = Lazy(name)
    assert not hasattr(module, "__args__") and name not in sys.modules
    assert module.escape("<") == "&lt;" and name in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018

"""A lazy module is imported when something in it is asked for, and not before."""

from __future__ import annotations

import sys

import pytest

from pipelines.basics.lazy import Lazy


def test_a_module_is_imported_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    module = Lazy("xml.sax.saxutils")
    monkeypatch.delitem(sys.modules, "xml.sax.saxutils", raising=False)
    assert "xml.sax.saxutils" not in sys.modules
    assert module.escape("<") == "&lt;" and "xml.sax.saxutils" in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018

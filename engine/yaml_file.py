"""YAML files of options, read so that no value is mistaken for another.

Scalars stay text (`00001`, `1e-4`, `on`): the type of the option decides what they mean. Only `null`, `~` and an empty
value are None. Errors name file and line. Duplicate keys are an error, because YAML's own reader silently takes the
last, and so are anchors, by which a small file can stand for a huge one.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from pipelines.basics.option_values import shown
from pipelines.basics.text import one_line

_LIMIT = 2**20  # bytes; an options file has a few hundred
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "seq", "map")}


class _Refused(yaml.MarkedYAMLError):
    """YAML that options have no use for."""


class _Loader(yaml.SafeLoader):
    """Text, lists and mappings, without anchors."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise _Refused(problem="anchors (&, *) are not allowed: write the value out", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        if node.tag not in _TAGS:
            raise _Refused(problem=f"tags ({shown(node.tag)}) are not allowed", problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in names[:index]:
                raise _Refused(problem=f"{key.value} is given twice: remove one", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a file; scalars as text, or None where they are null.

    Raises:
        ValueError: it can't be read, or is not an options file.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            what = "a folder" if stat.S_ISDIR(mode) else "a device"
            raise ValueError(f"{path} is {what}: give a YAML file of options")
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}): correct the path or its permissions") from error
    if len(content) > _LIMIT:
        raise ValueError(f"{path} is larger than {_LIMIT // 2**20} MiB: give a YAML file of options")
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, name: str) -> Any:
    """As `read_yaml`, from bytes; `name` says in messages where they come from."""
    try:
        return yaml.load(content.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not YAML: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{name} is not an options file: its brackets are nested too deeply") from error
    except _Refused as error:
        raise ValueError(f"{name}, {_place(error)}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        raise ValueError(f"{name} is not YAML: {_place(error)}: {error.problem}{hint}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {one_line(error)}") from error


def _place(error: yaml.MarkedYAMLError) -> str:
    return f"line {error.problem_mark.line + 1}" if error.problem_mark else "at its end"

"""From a command line and YAML files to checked options: the parser of every command.

jsonargparse only prints the help. It would read each value as YAML: a folder `null` would become None, and one called
`# x` a comment. Here the type of the option decides what a value means: see `basics.option_values`. All mistakes are
reported together, and a misspelt name with the one that was probably meant.

In YAML files too, scalars stay text (`00001`, `1e-4`, `on`) until the option's type decides; only `null`, `~` and an
empty value are None. Errors name file and line. Duplicate keys are an error, because YAML's own reader silently takes
the last, and so are anchors, with which a small file can stand for a huge one.
"""

from __future__ import annotations

import dataclasses
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pipelines.basics.option_values import (
    NO_BOUNDS,
    Bounds,
    Misfit,
    as_typed,
    bounds_of,
    convert,
    describe,
    is_several,
    nearest,
    raise_faults,
    to_builtins,
)
from pipelines.basics.text import one_line

_LIMIT = 2**20  # bytes; an options file has a few hundred
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "seq", "map")}
_NOT_IN_FILES = ("config", "print_config")

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Text, lists and mappings, without anchors."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise _refused("anchors (&, *) are not allowed: write the value out", event)
        node = super().compose_node(parent, index)
        if node.tag not in _TAGS:
            raise _refused(f"tags ({as_typed(node.tag)}) are not allowed", node)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in names[:index]:
                raise _refused(f"{key.value} is given twice: remove one", key)
        return super().construct_mapping(node, deep)


def _refused(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


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
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{name} is not an options file: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8; save it as UTF-8"
    if isinstance(error, yaml.MarkedYAMLError):
        place = f"line {error.problem_mark.line + 1}" if error.problem_mark else "at its end"
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        return f"{place}: {error.problem}{hint}"
    return "its brackets are nested too deeply" if isinstance(error, RecursionError) else one_line(error)


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        kind: its type, one of those in `basics.option_values`. bounds: of its numbers. default: if it is not given.
        bare: its value if it is given without one; None: it needs one; True: a flag, with a value after `=` only.
        is_required, is_positional: as in argparse.
    """

    kind: Any
    bounds: Bounds = NO_BOUNDS
    default: Any = None
    bare: Any = None
    is_required: bool = False
    is_positional: bool = False


_LOCAL_RANK = Option(str)  # given by DeepSpeed's launcher, and ignored: the environment says the same


@dataclass(frozen=True)
class Given:
    """An option, or a group of them, as it was written, and where, for messages."""

    name: str
    raw: Any
    where: str = "--"


class Parser:
    """A parser of `--name value` and of YAML files (`--config`).

    Args:
        description: of the command. usage: of its command line.
    """

    def __init__(self, description: str, usage: str | None = None) -> None:
        self.description, self.usage = description, usage
        self.options: dict[str, Option] = {}
        self.groups: set[str] = set()
        self._declared: list[Callable[[ArgumentParser], Any]] = []  # for `--help`
        self.add_argument("--config", type=Path, help="YAML file; command-line options override it.")
        self.add_argument("--print_config", action="store_true", help="Print all options as such a file, and exit.")

    def add_argument(self, name: str, *, bounds: Bounds = NO_BOUNDS, **declared: Any) -> None:
        """Add an option of this command alone.

        Args:
            name: with dashes, or without them for a positional argument.
            bounds: of its numbers.
            declared: type, choices, nargs, default, required, help and action="store_true", as in argparse.
        """
        is_flag, is_positional = declared.get("action") == "store_true", not name.startswith("-")
        kind: Any = Literal[tuple(declared["choices"])] if "choices" in declared else declared.get("type", str)
        kind = bool if is_flag else GenericAlias(list, (kind,)) if "nargs" in declared else kind
        self.options[name.lstrip("-")] = Option(
            kind,
            bounds,
            default=declared.get("default", False if is_flag else None),
            bare=True if is_flag else None,
            is_required=is_positional or declared.get("required", False),
            is_positional=is_positional,
        )
        self._declared.append(lambda parser: parser.add_argument(name, **declared))

    def add_dataclass(self, kind: type) -> None:
        """Add an option for each field of a dataclass, and a group for each dataclass in it."""
        self._add_fields(kind, "")
        self._declared.append(lambda parser: parser.add_class_arguments(kind, as_group=False))

    def parse_args(
        self, args: Sequence[str] | None = None, defaults: bool = True, before: Sequence[Path] = ()
    ) -> Namespace:
        """Read a command line.

        Args:
            args: None: the process's own. defaults: whether to fill in the defaults of options that were not given.
            before: files to read before those of the command line.

        Raises:
            ValueError: everything that is wrong with it.
            SystemExit: after `--help` or `--print_config`.
        """
        words = list(sys.argv[1:] if args is None else args)
        if "--help" in words or "-h" in words:
            self.print_help()
            raise SystemExit(0)
        faults: list[str] = []
        given = self.split(words, faults)
        named = [self.read_values([each], faults) for each in given if each.name == "config"]
        files = [*before, *(each["config"] for each in named if each)]
        of_files = [each for path in files for each in self.flatten(read_yaml(path), f"{path}: ", faults)]
        found = self.read_values([*of_files, *given], faults)
        missing = [name if option.is_positional else f"--{name}" for name, option in self.options.items()
                   if option.is_required and name not in found]  # fmt: skip
        if missing and defaults and not faults:
            faults.append(f"{', '.join(missing)} must be given; see --help")
        raise_faults(faults)
        namespace = Namespace()
        preset = {name: option.default for name, option in self.options.items()} if defaults else {}
        for name, value in {**preset, **found, "config": files or None}.items():
            namespace[name] = value
        if namespace.get("print_config"):
            values = {name: value for name, value in namespace.as_dict().items() if name not in _NOT_IN_FILES}
            print(yaml.safe_dump(to_builtins(values), sort_keys=False), end="")
            raise SystemExit(0)
        return namespace

    def print_help(self) -> None:
        """Every option with its type, its default and its help."""
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of a dataclass's fields
        parser = ArgumentParser(description=self.description, usage=self.usage, print_config=None)
        for declare in self._declared:
            declare(parser)
        for action in parser._actions:  # jsonargparse offers `--name+` and a file for each group; we don't
            action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
            if action.dest in self.groups:
                action.metavar, action.help = "'{NAME: VALUE, ...}'", "Several of these at once."
            if action.metavar == "{auto,True,False}":
                action.metavar = "{auto,true,false}"  # as it is typed
        parser.print_help()

    def split(self, words: Sequence[str], faults: list[str]) -> list[Given]:
        """The options of a command line with their values as written; appends anything else to `faults`."""
        given: list[Given] = []
        starts = [i for i, word in enumerate(words) if word.startswith("--")]
        loose = list(words[: starts[0] if starts else len(words)])  # words before, between or after options
        for start, end in zip(starts, [*starts[1:], len(words)]):
            name, equals, value = words[start][2:].partition("=")
            values = [*([value] if equals else []), *words[start + 1 : end]]
            option = _LOCAL_RANK if name == "local_rank" else self.options.get(name)
            if option is None and name not in self.groups:
                faults.append(self._unknown("--", name))
                continue
            if option is None or not is_several(option.kind):
                count = 0 if option and option.bare is True and not equals else 1
                loose += values[count:]
                values = values[:count]
            if not values and option and option.bare is not None:
                given.append(Given(name, option.bare))
            elif not values:
                what = describe(option.kind, option.bounds) if option else "{option: value, ...}"
                faults.append(f"--{name} needs a value: {what}")
            elif option is not _LOCAL_RANK:
                given.append(Given(name, values[0] if len(values) == 1 else values))
        positional = [name for name, option in self.options.items() if option.is_positional]
        given += [Given(name, word, "") for name, word in zip(positional, loose)]
        faults += [f"unexpected argument {as_typed(word)}; see --help" for word in loose[len(positional) :]]
        return given

    def read_values(self, given: Iterable[Given], faults: list[str]) -> dict[str, Any]:
        """Values by option, where a later one overrides an earlier one; appends wrong values to `faults`."""
        found: dict[str, Any] = {}
        for each in given:
            option = self.options.get(each.name)
            if option is None:  # a group: `--train '{epochs: 3}'`
                if not each.raw.lstrip().startswith("{"):
                    of_group = (f"--{name}" for name in self.options if name.startswith(f"{each.name}."))
                    faults.append(f"--{each.name} is a group of options: give one of {', '.join(of_group)}")
                    continue
                values = parse_yaml(each.raw.encode(errors="surrogateescape"), f"--{each.name}")
                found |= self.read_values(self.flatten(values, each.where, faults, f"{each.name}."), faults)
                continue
            try:
                found[each.name] = convert(each.raw, option.kind, option.bounds)
            except Misfit as error:
                faults.append(f"{each.where}{each.name} {as_typed(each.raw)} must be {error}")
        return found

    def flatten(self, values: Any, where: str, faults: list[str], prefix: str = "") -> list[Given]:
        """The options in nested groups, in order; appends unknown names to `faults`."""
        if not isinstance(values, dict):
            faults.append(
                f"{where}{prefix.rstrip('.') or 'the file'} is {as_typed(values)} and must be a group of options, "
                "{name: value}; leave it out for the defaults"
            )
            return []
        given: list[Given] = []
        for key, value in values.items():
            name = f"{prefix}{key}"
            if name in self.groups:
                given += self.flatten(value, where, faults, f"{name}.")
            elif name in self.options and name not in _NOT_IN_FILES:
                given.append(Given(name, value, where))
            else:
                faults.append(self._unknown(where, name))
        return given

    def _add_fields(self, kind: type, prefix: str) -> None:
        kinds = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            name, inner = f"{prefix}{item.name}", kinds[item.name]
            if dataclasses.is_dataclass(inner):
                self.groups.add(name)
                self._add_fields(inner, f"{name}.")  # type: ignore[arg-type]  # a class, not one of its objects
            else:
                self.options[name] = Option(inner, bounds_of(item), item.default, item.metadata.get("bare"))

    def _unknown(self, where: str, name: str) -> str:
        """A message that also names the options that may have been meant: by the last part, else by similar letters."""
        wanted = name.replace("-", "_").lower()
        last = wanted.rpartition(".")[2]
        known = (n for n, option in self.options.items() if not option.is_positional)
        names = [n for n in (*known, *self.groups) if where == "--" or n not in _NOT_IN_FILES]
        meant = [n for n in names if n.rpartition(".")[2] == last]
        if not meant:
            part = nearest(last, [n.rpartition(".")[2] for n in names])
            meant = list(filter(None, [nearest(wanted, names)])) or [n for n in names if n.rpartition(".")[2] == part]
        dashes = "--" if where == "--" else ""
        hint = f"did you mean {' or '.join(f'{dashes}{n}' for n in meant)}?" if meant else "--help lists all"
        return f"{where.removesuffix('--')}there is no option {dashes}{as_typed(name) if name else name}; {hint}"


def build(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass, and those in it, from the values of its options, or else their defaults."""
    kinds = get_type_hints(kind)

    def value_of(item: dataclasses.Field) -> Any:
        name, inner = f"{prefix}{item.name}", kinds[item.name]
        if dataclasses.is_dataclass(inner):
            return build(inner, values, f"{name}.")  # type: ignore[arg-type]  # a class
        return values.get(name, item.default)

    return kind(**{item.name: value_of(item) for item in dataclasses.fields(kind)})  # type: ignore[arg-type]

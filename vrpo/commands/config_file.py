"""The --config file: YAML -> what the user wrote, field by field, with line numbers.

Scalars are read as the text that stands in the file, not as what YAML makes of it: `save_strategy: no` is the
word "no", `output_dir: 2024` a name, `5e-7` a number; each field's own type decides, as it does for flags.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_SCALAR_TAGS = {
    f"tag:yaml.org,2002:{n}" for n in ("str", "int", "float", "bool", "null", "timestamp", "value")
}
_CONTAINER_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("seq", "map")}
_MERGE = "tag:yaml.org,2002:merge"
_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_MAX_DEPTH = 20
_MAX_NODES = 10_000


@dataclass(frozen=True)
class Kind:
    """What a field takes: of one value more than one, a mapping, nothing (null), and what its words are."""

    is_list: bool
    is_only_list: bool
    is_mapping: bool
    is_optional: bool
    is_bool: bool
    is_int: bool


@dataclass(frozen=True)
class Setting:
    """One line of the file. words: as they would stand behind the flag; None for null."""

    words: list[str] | None
    line: int


def read_config(
    path: str, fields: Mapping[str, Kind], sections: Mapping[str, str]
) -> tuple[dict[str, Setting], dict[str, Any]]:
    """Fields and sections of a file.

    Errors: ValueError or OSError of one sentence with the file, the line, what stands there and the cure.
        Unknown fields raise UnknownFieldError.
    """
    root = _root(path)
    if root is None:
        raise ValueError(
            f"config {path!r} is empty: it must map field names to values, `name: value` per line"
        )
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(
            f"config {path!r} must map field names to values, `name: value` per line; it is {_shape(root)}"
        )
    _check_nodes(path, root)
    yaml.SafeLoader("").flatten_mapping(root)  # `<<: *defaults`; what stands beside it wins
    settings, found = {}, {}
    for key, node in root.value:
        name, line = key.value, key.start_mark.line + 1
        if name in sections:
            if not isinstance(node, yaml.MappingNode):
                raise ValueError(
                    f"config {path!r}, line {line}: {name} must be a mapping, got {_shape(node)}"
                )
            found[name] = _construct(node)
        elif name not in fields:
            raise UnknownFieldError(path, name, line)
        else:
            try:
                settings[name] = Setting(_words(fields[name], node), node.start_mark.line + 1)
            except ValueError as error:
                raise ValueError(f"config {path!r}, line {line}: {name} {error}") from None
    return settings, found


class UnknownFieldError(ValueError):
    """A field that the command does not have; the caller knows similar names."""

    def __init__(self, path: str, name: str, line: int):
        super().__init__(f"config {path!r}, line {line}: unknown field {name!r}")
        self.name = name


def _text(path: str) -> str:
    if Path(path).is_dir():
        raise IsADirectoryError(f"config {path!r} is a folder; a YAML file is needed")
    if not Path(path).exists():
        raise FileNotFoundError(f"config {path!r}: no such file")
    content = Path(path).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"config {path!r} is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"config {path!r}, line {line}: not UTF-8 text ({error.reason})") from None


def _root(path: str) -> yaml.Node | None:
    try:
        return yaml.compose(_text(path), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        cure = "; YAML indents with spaces, not tabs" if r"'\t'" in told else ""
        raise ValueError(f"config {path!r} is not YAML: {told}{cure}") from None
    except RecursionError:
        raise ValueError(f"config {path!r} is nested too deeply") from None


def _check_nodes(path: str, root: yaml.Node) -> None:
    """ValueError for what no config needs: duplicate keys, tags, keys that are no words, depth, cycles."""
    stack, count = [(root, 0)], 0
    while stack:
        node, depth = stack.pop()
        where = f"config {path!r}, line {node.start_mark.line + 1}"
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_NODES:
            raise ValueError(f"{where}: nested too deeply, or an anchor that holds itself")
        if isinstance(node, yaml.ScalarNode):
            if node.tag not in _SCALAR_TAGS:
                raise ValueError(f"{where}: the tag {node.tag!r} is not supported; write the value plainly")
            if any(ch == "\0" or "\ud800" <= ch <= "\udfff" for ch in node.value):
                raise ValueError(f"{where}: a character that no text has (NUL or half a surrogate pair)")
            continue
        if node.tag not in _CONTAINER_TAGS:
            raise ValueError(f"{where}: the tag {node.tag!r} is not supported; write the value plainly")
        if isinstance(node, yaml.SequenceNode):
            stack += [(item, depth + 1) for item in node.value]
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"config {path!r}, line {line}: a key must be a word, not {_shape(key)}")
            if key.value in lines:
                raise ValueError(
                    f"config {path!r}: {key.value} stands in line {lines[key.value]} and in line {line}; "
                    "remove one of them"
                )
            lines[key.value] = line
            if key.tag != _MERGE:
                stack.append((key, depth + 1))
            elif not isinstance(value, (yaml.MappingNode, yaml.SequenceNode)):
                raise ValueError(
                    f"config {path!r}, line {line}: << needs a mapping, such as an *alias of one"
                )
            stack.append((value, depth + 1))


def _words(kind: Kind, node: yaml.Node) -> list[str] | None:
    """The node as the words of a flag. ValueError whose text goes on after the name of the field."""
    if isinstance(node, yaml.MappingNode):
        if not kind.is_mapping:
            raise ValueError(f"takes {'values' if kind.is_list else 'one value'}, not a mapping")
        return [json.dumps(_construct(node))]
    if isinstance(node, yaml.SequenceNode):
        if not kind.is_list:
            raise ValueError("takes one value, not a list")
        if not node.value:
            raise ValueError("is an empty list; leave the line out instead")
        words = [_words(kind, item) if isinstance(item, yaml.ScalarNode) else None for item in node.value]
        if None in words:
            raise ValueError("takes a list of plain values")
        return [word for item in words for word in item]
    if node.tag == _NULL:
        if not kind.is_optional:
            raise ValueError("needs a value: it is null; leave the line out for the default")
        return None
    if node.tag == _BOOL and kind.is_bool:
        return ["true" if node.value.lower() in ("yes", "true", "on") else "false"]
    if kind.is_int and re.fullmatch(r"[-+]?0\d+", node.value):
        raise ValueError(f"is {node.value}, which YAML takes for octal; write it without the leading 0")
    return [node.value]


def _construct(node: yaml.Node) -> Any:
    """The value as YAML sees it, for what is not a flag."""
    return yaml.SafeLoader("").construct_document(node)


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else f"the word {node.value[:60]!r}"

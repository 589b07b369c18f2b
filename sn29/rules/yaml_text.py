"""YAML as the competition files use it, and where in a text its values stand. The only owner of `yaml`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sn29.errors import Reason, Rejected

_MAX_SHOWN = 80


def shown(value: object) -> str:
    """A value as an error prints it."""
    text = "null" if value is None else str(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def load(where: str, text: str) -> dict[str, object]:
    """The mapping that a file holds. Raises Rejected(COMPETITION_FILE) naming `where` and the line."""
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader with fewer types
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"{where}: line {mark.line + 1}" if mark else where
        raise Rejected(Reason.COMPETITION_FILE, error.problem or "unreadable text", "YAML", line) from None
    except RecursionError:
        raise Rejected(Reason.COMPETITION_FILE, "nested too deep", "a mapping of fields", where) from None
    except yaml.YAMLError as error:
        raise Rejected(Reason.COMPETITION_FILE, " ".join(str(error).split()), "YAML", where) from None
    if not isinstance(data, dict):
        raise Rejected(Reason.COMPETITION_FILE, shown(data), "a mapping of fields", where)
    return data


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2's core schema, which are what a reader expects.

    PyYAML follows YAML 1.1, where 6.9e9 is a string, 1:30 is ninety, `no` is false and a second `limits:` silently
    replaces the first. Here 6.9e9 is a number, only true and false are booleans, and a repeated key is an error. Tags
    and aliases have no use in a file that people read to know the rules, so they are errors as well.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, "a tag (!) or an alias (*)", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} a second time", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: Iterable[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


# The longest numbers stay shorter than a commit sha, so that a sha of digits is never taken for one.
_resolve("null", r"(?:~|null|)$", ["~", "n", ""])
_resolve("bool", r"(?:true|false)$", "tf")
_resolve("int", r"(?:0|-?[1-9][0-9]{0,29})$", "-0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]{1,20}|[0-9]{1,20}\.[0-9]{0,20}|[0-9]{1,20}(?=[eE]))(?:[eE][-+]?[0-9]{1,3})?$",
    "-+.0123456789",
)
_resolve("float", r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$", "-+.")


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A section of a file that names a Hub repository, and where its pins stand (or would stand) in the text."""

    path: tuple[str | int, ...]
    """Fields (and numbers of list elements) that lead to the section."""
    hub: str
    is_tokenizer: bool
    """It has a fingerprint or a start token; else it is a data set."""
    revision: str | None
    fingerprint: str | None
    spans: tuple[tuple[str, int, int], ...]
    """(field, start, end): characters of `revision` and `fingerprint`, as far as the section has them."""
    after_hub: int
    """Where a field that the section does not have is written: behind the value of `hub`."""
    line_start: str | None
    """What a new line of this section begins with, up to the field's name; None in a {section} of one line."""


def hub_places(where: str, text: str) -> tuple[HubPlace, ...]:
    """Every section of the file that has a `hub`, in the order of the text, also those inside `changes`.

    Raises Rejected(COMPETITION_FILE) for a text that `load` refuses.
    """
    load(where, text)
    return tuple(_hub_places(yaml.compose(text, _Loader), ()))


def with_pins(where: str, text: str, pins: Mapping[HubPlace, Mapping[str, str]]) -> str:
    """The text with these values of `revision` and `fingerprint` written in; every other character stays.

    Raises ValueError when the new text would say anything else besides: then nothing of it may be used.
    """
    new, line_end = text, "\r\n" if "\r\n" in text else "\n"
    edits = []
    for place, values in pins.items():
        spans = {field: (start, end) for field, start, end in place.spans}
        for field, value in values.items():
            if field in spans:
                start, end = spans[field]
                edits.append((start, end, f'"{value}"' if end > start else f' "{value}"'))
            elif place.line_start is None:
                edits.append((place.after_hub, place.after_hub, f', {field}: "{value}"'))
            else:
                at = re.compile(r"\r?\n|$").search(text, place.after_hub)
                end = at.start() if at else len(text)
                edits.append((end, end, f'{line_end}{place.line_start}{field}: "{value}"'))
    for start, end, written in sorted(edits, reverse=True):
        new = new[:start] + written + new[end:]
    expected: Any = load(where, text)
    for place, values in pins.items():
        section = expected
        for part in place.path:
            section = section[part]
        section.update(values)
    if load(where, new) != expected:
        raise ValueError(f"{where}: pins cannot be written without changing something else")
    return new


def _hub_places(node: yaml.Node | None, path: tuple[str | int, ...]) -> Iterator[HubPlace]:
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _hub_places(child, (*path, index))
    if not isinstance(node, yaml.MappingNode):
        return
    fields = {str(key.value): (key, value) for key, value in node.value}
    if "hub" in fields:
        key, hub = fields["hub"]
        pins = {name: fields[name][1] for name in ("revision", "fingerprint") if name in fields}
        given = {name: None if pin.tag.endswith(":null") else str(pin.value) for name, pin in pins.items()}
        yield HubPlace(
            path=path,
            hub=str(hub.value),
            is_tokenizer="fingerprint" in fields or "start_token" in fields,
            revision=given.get("revision"),
            fingerprint=given.get("fingerprint"),
            spans=tuple((name, pin.start_mark.index, pin.end_mark.index) for name, pin in pins.items()),
            after_hub=hub.end_mark.index,
            line_start=None if node.flow_style else " " * key.start_mark.column,
        )
    for key, child in node.value:
        yield from _hub_places(child, (*path, str(key.value)))

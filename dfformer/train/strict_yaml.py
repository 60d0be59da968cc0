"""YAML from an untrusted source: no tags, aliases, repeated keys, deep nesting or very long numbers."""

from typing import Any

import yaml
from jsonargparse import get_loader

_MAX_TEXT = 2**20  # characters
_MAX_DEPTH = 20


def load(text: str) -> Any:
    """The value of a recipe, or of a setting on the command line.

    Raises:
        ValueError: the text is too long or nested too deep, or it has an alias, a tag, a repeated key, or a very long
            number. yaml.YAMLError: it is not YAML.
    """
    if len(text) > _MAX_TEXT:
        raise ValueError(f"YAML: has {len(text)} characters, at most {_MAX_TEXT} are allowed")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"YAML: is nested deeper than {_MAX_DEPTH}")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"YAML: has the alias *{event.anchor[:40]}, write its value instead")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            raise ValueError(f"YAML: has the tag {event.tag[:60]}, write the value without it")
        if isinstance(event, yaml.ScalarEvent) and _is_endless(event.value):
            raise ValueError(f"YAML: {event.value[:20]}... is a number of {len(event.value)} characters")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None:
        _check_keys(node)
    return get_loader("yaml")(text)


def _is_endless(text: str) -> bool:
    return len(text) > 40 and set(text) <= set("+-_0123456789abcdefxoABCDEF.:") and any(c.isdigit() for c in text[:3])


def _check_keys(node: yaml.Node) -> None:
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}  # of keys; one that is a list or a mapping is no key of a dict, so loading fails
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"in line {lines[key.value]} and line {line}"
                raise ValueError(f"YAML: the key {key.value[:60]!r} is repeated, {where}")
            lines[key.value] = line
        children = [value for _, value in node.value]
    for child in children:
        _check_keys(child)

"""The directive ``config-keys``: all keys of the configuration, as the schema documents them.

Docstrings of the schema use double backticks for code, which Markdown reads as code as well.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from docutils import nodes
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata
from typing_extensions import TypeIs

import configs.schema
import configs.schema_slurm
from configs.schema import Config
from configs.section import Section

_FENCE = "````"
_PARSED = {
    "parse_bytes": "size in bytes, or text such as `512MiB` or `2GB`",
    "parse_seconds": "duration in seconds, or text such as `30s` or `5min`",
    "parse_walltime": "duration with its unit: `90min`, `4h` or `'1-12:00:00'`",
    "_one_or_more": "list of texts, or a single one",
    "_checked_limit": "whole number at least 1, or list of texts, or `null`",
}
"""What a key accepts whose value is parsed, by the name of the function that parses it."""

_SCALARS = {
    str: "text",
    bool: "true or false",
    int: "whole number",
    float: "number",
    types.NoneType: "`null`",
}


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive."""
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}


class ConfigKeys(SphinxDirective):
    """All sections and keys."""

    def run(self) -> list[nodes.Node]:
        """Return the nodes; the page is rebuilt when the schema changes."""
        for module in (configs.schema, configs.schema_slurm):
            self.env.note_dependency(inspect.getfile(module))
        return self.parse_text_to_nodes("\n".join(markdown()), allow_section_headings=True)


def markdown() -> Iterator[str]:
    """Yield the lines of the page after its title: a heading per section, an entry per key."""
    yield from _entry("version", Config, "version", Config.model_fields["version"])
    for name, field in Config.model_fields.items():
        if is_section(section := field.annotation):
            yield from _section(name, section)


def _section(name: str, section: type[Section]) -> Iterator[str]:
    yield from (f"## {name}", "", inspect.getdoc(section) or "", "")
    stages = []
    for key, field in section.model_fields.items():
        if is_section(field.annotation):
            stages.append(f"- `{name}.{key}`: {field.description}")
        else:
            yield from _entry(f"{name}.{field.alias or key}", section, key, field)
    if stages:
        yield from ("Sections with the resources of one stage, which take the same keys:", "")
        yield from (*stages, "")


def _entry(name: str, section: type[Section], key: str, field: FieldInfo) -> Iterator[str]:
    hint = get_type_hints(section, include_extras=True)[key]
    yield from (f"{_FENCE}{{confval}} {name}", f":type: {type_text(hint)}")
    yield from (f":default: {default_text(field, hint)}", "")
    yield from (field.description or "", _FENCE, "")


def is_section(annotation: Any) -> TypeIs[type[Section]]:
    """Return whether a key holds a section of keys."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def type_text(hint: Any) -> str:
    """Return what a key accepts, with its unit, e.g. ``whole number at least 1``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _annotated_text(arguments[0], arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin is tuple:
        return "list of texts"
    if origin is dict:
        return "mapping of names to values"
    return _SCALARS[hint]


def _annotated_text(hint: Any, metadata: tuple[Any, ...]) -> str:
    for item in metadata:
        if isinstance(item, BeforeValidator):
            return _PARSED[item.func.__name__]
    return type_text(hint) + "".join(_bounds(metadata))


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    for item in metadata:
        for bound in item.metadata if isinstance(item, FieldInfo) else [item]:
            if isinstance(bound, annotated_types.Gt):
                yield f" above {bound.gt}"
            elif isinstance(bound, annotated_types.Ge):
                yield f" at least {bound.ge}"
            elif isinstance(bound, annotated_types.Le) and bound.le == 1:
                yield f" and at most {bound.le}"
            elif isinstance(bound, annotated_types.Lt) and bound.lt == 1:
                yield f" and below {bound.lt}"


def default_text(field: FieldInfo, hint: Any) -> str:
    """Return the default as it is written in YAML; sizes in binary units."""
    if field.is_required():
        return "none, the key is required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | dict):
        return f"`{list(value) or ('[]' if isinstance(value, tuple) else '{}')}`".replace("'", "")
    if "`512MiB`" in type_text(hint):
        return f"`{_binary(value)}`"
    return f"`{value}`" if value != "" else "`''`"


def _binary(n_bytes: int) -> str:
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2)):
        if n_bytes % size == 0:
            return f"{n_bytes // size}{unit}"
    return str(n_bytes)

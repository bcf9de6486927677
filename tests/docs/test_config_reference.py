"""The reference of the configuration keys is complete, and its defaults are those of the schema."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import yaml

from configs.schema import Config
from configs.section import Section
from docs.config_reference import is_section, markdown

REQUIRED = {
    "version": "1",
    "data.root": "data",
    "encoder.name": "vit",
    "training.run_name": "run",
}


def entries() -> dict[str, tuple[str, str, str]]:
    """Return type, default and meaning of each key on the page."""
    pattern = r"````\{confval\} (\S+)\n:type: ([^\n]+)\n:default: ([^\n]+)\n\n(.+?)\n````"
    found = re.findall(pattern, "\n".join(markdown()), re.DOTALL)
    return {name: (type_, default, meaning) for name, type_, default, meaning in found}


def keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield every key of a section. Those of the stages of a cluster are documented once."""
    for name, field in section.model_fields.items():
        if not is_section(inner := field.annotation):
            yield f"{prefix}{field.alias or name}"
        elif not prefix:
            yield from keys(inner, f"{name}.")


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    assert list(entries()) == list(keys(Config))


def test_the_defaults_of_the_page_are_those_of_the_schema() -> None:
    tree: dict[str, object] = {}
    for name, (_, default, _) in entries().items():
        is_required = default == "none, the key is required"
        assert is_required == (name in REQUIRED), name
        value = yaml.safe_load(REQUIRED[name] if is_required else default.strip("`"))
        *sections, key = name.split(".")
        for section in sections:
            tree.setdefault(section, {})[key] = value  # type: ignore[index]
        if not sections:
            tree[key] = value
    documented = Config.model_validate(tree)
    assert documented == Config.model_validate(
        {
            "version": 1,
            "data": {"root": "data"},
            "encoder": {"name": "vit"},
            "training": {"run_name": "run"},
        }
    )


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("data.limit", "whole number at least 1, or list of texts, or `null`", "`null`"),
        ("stream.prefetch_bytes", "size in bytes, or text such as `512MiB` or `2GB`", "`1GiB`"),
        ("storage.timeout", "duration in seconds, or text such as `30s` or `5min`", "`120.0`"),
        ("slurm.mem", "text or `null`", "`null`"),
        ("training.holdout", "number at least 0 and at most 1", "`0.1`"),
        ("training.ema", "number at least 0 and below 1", "`0.0`"),
        ("stream.unit", "`frame`, `shot`", "`frame`"),
        ("eval.windows", "whole number above 0 or `whole`", "`4`"),
    ],
)  # fmt: skip
def test_a_type_contains_units_and_bounds(key: str, type_: str, default: str) -> None:
    assert entries()[key][:2] == (type_, default)

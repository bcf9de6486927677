"""Aliases count as often as they are referred to."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from configs.bounded_yaml import BoundedLoader


def load(lines: list[str]) -> Any:
    return yaml.load("\n".join(lines), Loader=BoundedLoader)  # noqa: S506  # a SafeLoader


def test_a_file_may_have_a_million_values_aliases_included() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 5)]
    assert load(lines)["a4"][9][9][9][9] == ["x"] * 10
    lines.append(f"a5: [{', '.join(['*a4'] * 10)}]")
    with pytest.raises(ValueError, match=r"more than 1,000,000 values or 20 levels"):
        load(lines)


def test_levels_of_aliases_are_counted_and_a_list_in_itself_is_refused() -> None:
    lines = ["a1: &a1 [x]", *(f"a{k}: &a{k} [*a{k - 1}]" for k in range(2, 20))]
    assert load(lines)["a2"] == [["x"]]
    for endless in ([*lines, "a20: [*a19]"], ["a: &a [x, *a]"], ["a: &a {b: [*a]}"]):
        with pytest.raises(ValueError, match=r"or 20 levels"):
            load(endless)

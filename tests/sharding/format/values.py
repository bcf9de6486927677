"""Random field values of the on-disk formats."""

from __future__ import annotations

from hypothesis import strategies as st

counts = st.integers(0, 2**40)
texts = st.text(max_size=20)
ids = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip

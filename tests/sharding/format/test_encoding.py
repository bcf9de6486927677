from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs.errors import DataError
from sharding.format.encoding import (
    canonical_json,
    npy_bytes,
    npz_arrays,
    npz_bytes,
    read_npy_header,
    rows_shape,
)
from tests.sharding.films import is_silent_or_one_line
from tests.sharding.format.values import json_values

arrays = hnp.arrays(
    st.sampled_from(["<f2", "<f4", ">f8", "<i4", "|u1"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    fill=st.just(1),
)


@given(arrays, st.sampled_from([(1, 0), (2, 0), (3, 0)]), st.booleans(), st.binary(max_size=20))
def test_the_header_of_any_npy_is_read_from_the_current_position(
    array: npt.NDArray[Any], version: tuple[int, int], fortran: bool, before: bytes
) -> None:
    buffer = io.BytesIO()
    stored = np.array(array, order="F" if fortran else "C")
    np.lib.format.write_array(buffer, stored, version)
    data = buffer.getvalue()
    file = io.BytesIO(before + data + b"the next member")
    file.seek(len(before))
    header = read_npy_header(file, len(data), "a.npy")
    assert (header.shape, header.dtype) == (array.shape, array.dtype)
    assert header.fortran_order == (stored.flags.fnc and stored.ndim > 1)
    assert header.file_bytes == len(data)
    assert data[header.n_bytes :] == stored.tobytes("F" if header.fortran_order else "C")


@given(st.data())
def test_a_corrupt_header_is_a_one_line_error(data: st.DataObject) -> None:
    valid = npy_bytes(np.zeros((3, 4), np.float16))
    at = data.draw(st.integers(0, 127))
    corrupt = valid[:at] + data.draw(st.binary(min_size=1, max_size=4)) + valid[at + 1 :]
    corrupt = corrupt[: data.draw(st.integers(0, len(corrupt)))]
    size = len(corrupt)
    assert is_silent_or_one_line(lambda: read_npy_header(io.BytesIO(corrupt), size, "a.npy"))


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"PK\x03\x04" + bytes(200), bytes(200)])
def test_a_file_of_another_kind_is_not_an_npy(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^x: not a \.npy array"):
        read_npy_header(io.BytesIO(data), len(data), "x")


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((3, 6), (3, 6)),
        ((3, 1), (3, 1)),
        ((3, 1, 6), (3, 6)),
        ((1, 3, 6), (3, 6)),
        ((3, 6, 1, 1), (3, 6)),
        ((1, 1, 6), (1, 6)),
        ((6,), (1, 6)),
        ((), ()),
        ((3, 4, 5), (3, 4, 5)),
    ],
)
def test_axes_of_length_1_are_no_part_of_a_table(
    shape: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    assert rows_shape(shape) == rows


def test_a_header_of_python_2_is_read_without_a_warning() -> None:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10L, 512L), }"
    data = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117) + b"\n"
    header = read_npy_header(io.BytesIO(data), len(data), "a.npy")
    assert (header.shape, header.dtype.str, header.n_bytes) == ((10, 512), "<f4", len(data))


def test_a_header_that_claims_gigabytes_is_not_read_into_memory() -> None:
    class Counted(io.BytesIO):
        n_read = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.n_read += len(data)
            return data

    data = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + bytes(200_000)
    file = Counted(data)
    with pytest.raises(DataError, match=r"not a \.npy array"):
        read_npy_header(file, 2**32, "x")
    assert file.n_read <= 64 * 1024


@given(json_values)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: object) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert canonical_json(json.loads(text)) == text


@given(hnp.arrays(st.sampled_from(["<f2", ">f4", "u1", "i8", "S3"]), hnp.array_shapes(max_dims=2)))
def test_numpy_reads_our_npy_which_is_little_endian(array: np.ndarray) -> None:
    loaded = np.load(io.BytesIO(npy_bytes(array)))
    np.testing.assert_array_equal(loaded, array)
    assert loaded.dtype.str == array.dtype.newbyteorder("<").str


def test_our_npy_of_a_feature_array_equals_that_of_numpy_byte_for_byte() -> None:
    array = np.arange(12_129 * 4, dtype=np.float16).reshape(-1, 4)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    assert npy_bytes(array) == buffer.getvalue()


def test_an_npz_contains_no_timestamp() -> None:
    with zipfile.ZipFile(io.BytesIO(npz_bytes({"a": np.arange(3)}))) as archive:
        assert archive.getinfo("a.npy").date_time == (1980, 1, 1, 0, 0, 0)


def test_a_missing_array_of_an_npz_is_named() -> None:
    data = npz_bytes({"a": np.arange(3)})
    with pytest.raises(DataError, match=r"here: .*b"):
        npz_arrays(data, "here", ["b"])

"""The runner's own reader and writer of safetensors files, beside the official library."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refpeft.conformance import tensors
from refpeft.errors import RefpeftError

ARRAYS = {
    "a": np.arange(6, dtype="f4").reshape(2, 3),
    "b.c": np.array([1.5], "f8"),
    "none": np.zeros((0, 4), "i4"),
    "number": np.array(7, "u1"),
    "half": np.array([0.5, -2], "f2"),
    "yes": np.array([True, False]),
}


def test_what_is_written_the_library_reads_and_what_it_writes_is_read(tmp_path):
    tensors.write(tmp_path / "ours", ARRAYS)
    save_file(ARRAYS, tmp_path / "theirs", metadata={"format": "pt"})
    for got in (load_file(tmp_path / "ours"), tensors.read(tmp_path / "theirs"), tensors.read(tmp_path / "ours")):
        assert got.keys() == ARRAYS.keys()
        assert all(np.array_equal(got[n], a) and got[n].dtype == a.dtype for n, a in ARRAYS.items())
        assert all(got[name].shape == array.shape for name, array in ARRAYS.items())


def test_arrays_are_written_row_by_row_however_they_lie_in_memory(tmp_path):
    tensors.write(tmp_path / "file", {"turned": ARRAYS["a"].T, "reversed": ARRAYS["a"][:, ::-1]})
    got = tensors.read(tmp_path / "file")
    assert np.array_equal(got["turned"], ARRAYS["a"].T) and np.array_equal(got["reversed"], ARRAYS["a"][:, ::-1])


def test_bfloat16_is_read_as_float32(tmp_path):
    array = np.linspace(-3, 3, 11, dtype="f4").astype(ml_dtypes.bfloat16)
    save_file({"x": array}, tmp_path / "file")
    got = tensors.read(tmp_path / "file")["x"]
    assert got.dtype == np.float32
    assert np.array_equal(got, array.astype("f4"))


def test_other_dtypes_are_not_written(tmp_path):
    with pytest.raises(RefpeftError, match="tensor 'x' has dtype complex128, expected float64, "):
        tensors.write(tmp_path / "file", {"x": np.zeros(2, complex)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its header would end at byte 8 of 0"),
        (b"\xff" * 8, "its header would end at byte 18,446"),
        (b"\x02" + b"\0" * 7 + b"[]", "file: its header is no JSON object of objects"),
        (b"\x02" + b"\0" * 7 + b"{]", "not a whole safetensors file: Expecting"),
        (b'{"x":' + b"[" * 100_000, "not a whole safetensors file: maximum recursion"),
        (b'{"x":3}', "not a whole safetensors file"),
        (
            b'{"x":{"dtype":"F8","shape":[],"data_offsets":[0,1]}}',
            "tensor 'x' has dtype 'F8', expected one of F64, F32",
        ),
        (
            b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            r"tensor 'x' of shape \(2,\) does not fit in bytes 0",
        ),
        (b'{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}', r"of shape \(2,\) does not fit in bytes 0 to 1"),
        (b'{"x":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "the shape and place of tensor 'x' are not whole"),
        (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}', "the shape and place of tensor 'x' are not whole"),
        (b'{"x":{"dtype":"U8","shape":[1]}}', "not a whole safetensors file: 'data_offsets'"),
    ],
)
def test_damage_is_one_clear_line(tmp_path, data, message):
    if data.startswith(b"{"):
        data = len(data).to_bytes(8, "little") + data
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(RefpeftError, match=message):
        tensors.read(tmp_path / "file")


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(RefpeftError, match="gone: cannot be read: No such file"):
        tensors.read(tmp_path / "gone")

import json
import os
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from refpeft import files, report
from refpeft.errors import RefpeftError

DTYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32, np.int64, np.bool_]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def example_tensors() -> dict[str, np.ndarray]:
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.0),
        "empty": np.zeros((0, 4), np.float16),
        "odd": np.array([True, False, True]),
    }


@pytest.fixture(scope="module")
def good(folder) -> bytes:
    files.write_safetensors(folder / "good.safetensors", example_tensors(), {"format": "pt"})
    return (folder / "good.safetensors").read_bytes()


def raw(header, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# Writing


def test_atomic_write_leaves_the_old_file_and_no_temporary_one_when_the_body_fails(tmp_path):
    target = tmp_path / "x"
    files.write_text(target, "old")
    with pytest.raises(KeyError), files.atomic_write(target) as temporary:
        temporary.write_text("half")
        assert target.read_text() == "old"
        raise KeyError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_pipe_and_a_link_to_an_open_file_are_written_and_stay_what_they_are(tmp_path):
    """As /dev/null and /dev/stdout, which root could replace."""
    reading, writing = os.pipe()
    (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{writing}")
    os.mkfifo(tmp_path / "fifo")
    other = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    for name, end in {"stdout": reading, "fifo": other}.items():
        files.write_text(tmp_path / name, "report")
        assert os.read(end, 100) == b"report"
    assert (tmp_path / "stdout").is_symlink()
    assert (tmp_path / "fifo").is_fifo()
    for descriptor in (reading, writing, other):
        os.close(descriptor)


def test_write_json_is_read_back_and_refuses_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"é": [1, None]})
    assert files.read_json(tmp_path / "x.json") == {"é": [1, None]}
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert files.read_json(tmp_path / "x.json") == {"é": [1, None]}


def test_replace_directory_replaces_a_whole_directory_or_nothing(tmp_path):
    target = tmp_path / "run"
    with files.replace_directory(target) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(KeyError), files.replace_directory(target) as temporary:
        (temporary / "new").write_text("2")
        raise KeyError
    assert os.listdir(target) == ["old"]
    with files.replace_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new").write_text("2")
    assert os.listdir(target) == ["sub"]
    assert os.listdir(tmp_path) == ["run"]


# Reading back


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_tensors_are_read_back_bit_for_bit_also_by_the_safetensors_library(folder, data):
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), max_size=4))
    values = [np.asarray(data.draw(hnp.arrays(np.uint8, data.draw(shapes)))) for _ in dtypes]
    tensors = {f"t{i}": value.astype(dtype) for i, (value, dtype) in enumerate(zip(values, dtypes, strict=True))}
    files.write_safetensors(folder / "x.safetensors", tensors)
    ours, theirs = files.read_safetensors(folder / "x.safetensors"), load_file(folder / "x.safetensors")
    assert set(ours) == set(theirs) == set(tensors)
    for name, array in tensors.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape
        assert ours[name].tobytes() == array.tobytes() == theirs[name].tobytes()


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    files.write_safetensors(tmp_path / "x", {"t": array.T, "s": array[:, ::2]})
    back = files.read_safetensors(tmp_path / "x")
    np.testing.assert_array_equal(back["t"], array.T)
    np.testing.assert_array_equal(back["s"], array[:, ::2])


def test_read_tensors_are_read_only_views_of_the_file_that_allocate_nothing(tmp_path):
    files.write_safetensors(tmp_path / "x", {"t": np.zeros(1 << 22, np.float32)})
    tracemalloc.start()
    tensor = files.read_safetensors(tmp_path / "x")["t"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert not tensor.flags.writeable and type(tensor) is np.ndarray


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=4), st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0))))
def test_a_file_written_tensor_by_tensor_is_that_of_the_library(folder, drawn):
    tensors = {name: np.ones(shape, dtype) for name, dtype, shape in drawn}
    files.write_safetensors(folder / "at_once", tensors, {"format": "pt"})
    save_file(tensors, folder / "library", {"format": "pt"})
    assert (folder / "at_once").read_bytes() == (folder / "library").read_bytes()
    with files.safetensors_writer(folder / "one_by_one", {"format": "pt"}) as write:
        for name, array in tensors.items():
            write(name, array)
    assert (folder / "one_by_one").read_bytes() == (folder / "at_once").read_bytes()


def test_a_full_disk_is_an_error_with_the_name_that_was_asked_for(tmp_path):
    def one_by_one(path, tensors):
        with files.safetensors_writer(path) as write:
            write("t", tensors["t"])

    def in_a_directory(path, tensors):
        with files.replace_directory(path) as folder:
            files.write_safetensors(folder / "x", tensors)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for write in (files.write_safetensors, one_by_one, in_a_directory):
            with pytest.raises(OSError) as caught:
                write(tmp_path / "name", {"t": np.ones(1000)})
            assert caught.value.filename == str(tmp_path / "name") and caught.value.strerror
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_a_file_that_fails_on_the_way_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), files.safetensors_writer(tmp_path / "x") as write:
        write("t", np.ones(3))
        raise KeyError
    with pytest.raises(RefpeftError, match="tensor 't'"), files.safetensors_writer(tmp_path / "x") as write:
        write("t", np.ones(3, complex))
    assert not os.listdir(tmp_path)


def test_a_mapped_tensor_that_was_let_go_takes_no_memory_and_is_the_same(tmp_path):
    files.write_safetensors(tmp_path / "x", {"a": np.arange(1 << 21), "b": np.arange(1000)})
    tensors = files.read_safetensors(tmp_path / "x")
    before = report.resident()
    assert tensors["a"].sum() and report.resident() - before > 12 << 20
    files.let_go(tensors["a"][2:].reshape(-1, 2).T)
    assert report.resident() - before < 4 << 20
    assert np.array_equal(tensors["a"], np.arange(1 << 21)) and np.array_equal(tensors["b"], np.arange(1000))
    mine = np.arange(3)
    files.let_go(mine)
    assert mine.sum() == 3


def test_writing_a_dtype_that_the_format_lacks_names_the_tensor(tmp_path):
    with pytest.raises(RefpeftError, match="tensor 't' has dtype complex128"):
        files.write_safetensors(tmp_path / "x", {"t": np.zeros(2, np.complex128)})
    assert not os.listdir(tmp_path)


# Files that are not what they should be


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header should have 0 bytes, the file has 0"),
        (b"1234567", "the file has 7"),
        ((2**60).to_bytes(8, "little") + b"{}", "header should have 1152921504606846976 bytes"),
        (b"\xff" * 8, "header should have"),
        (raw(b"{"), "header is not JSON"),
        (raw(b"\xff\xfe"), "header is not JSON"),
        (raw(b"[" * 100_000), "header is not JSON"),
        (raw(b'{"a": 1' + b"0" * 9000 + b"}"), "header is not JSON"),
        (raw([]), "header is a JSON list"),
        (raw(b'{"a": {}, "a": {}}'), "key 'a' stands there twice"),
        (raw({"a": 3}), "tensor 'a': expected an entry"),
        (raw({"a": {"dtype": "F32"}}), "tensor 'a': expected an entry"),
        (raw({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, bytes(2)), "tensor 'a' has dtype 'F8_E4M3'; refpeft reads"),
        (raw({"a": entry(dtype=["F32"])}, bytes(8)), "tensor 'a' has dtype"),
        (raw({"a": entry(shape=(-1, -2))}, bytes(8)), "tensor 'a': shape and data_offsets"),
        (raw({"a": entry(shape=(2.0,))}, bytes(8)), "tensor 'a': shape and data_offsets"),
        (raw({"a": entry(shape=(True, 2))}, bytes(8)), "tensor 'a': shape and data_offsets"),
        (raw({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "tensor 'a': shape and data_offsets"),
        (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "tensor 'a' needs 8 bytes"),
        (raw({"a": entry(shape=(2**60, 2**60), offsets=(0, 8))}, bytes(8)), "tensor 'a': its shape is too big"),
        (raw({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}), "tensor 'a': its shape is too big"),
        (raw({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4)), "tensor 'a': its shape is too big"),
        (raw({"a": entry(shape=(2**62,) * 9999)}, bytes(8)), "tensor 'a': its shape is too big"),
        (raw({"a": entry(shape=(2**70,))}, bytes(8)), "tensor 'a': shape and data_offsets"),
        (raw({"a": entry(shape=(2**58,), offsets=(0, 2**60))}, bytes(8)), "tensor 'a' ends at byte 11529215046068"),
        (raw({"a": entry()}, bytes(7)), "tensor 'a' ends at byte 8, the file holds 7"),
        (raw({"a": entry()}, bytes(9)), "not a valid safetensors file"),
        (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "not a valid safetensors file"),
        (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "not a valid safetensors file"),
    ],
)
def test_a_corrupt_file_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(RefpeftError) as error:
        files.read_safetensors(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_every_truncation_of_a_file_is_an_error(folder, good):
    for length in range(len(good)):
        (folder / "cut").write_bytes(good[:length])
        with pytest.raises(RefpeftError):
            files.read_safetensors(folder / "cut")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bits_give_tensors_or_an_error_of_ours(folder, good, data):
    header_bits = 8 * (8 + int.from_bytes(good[:8], "little"))
    broken = bytearray(good)
    for bit in data.draw(st.lists(st.integers(0, header_bits - 1), min_size=1, max_size=4)):
        broken[bit // 8] ^= 1 << bit % 8
    (folder / "flipped").write_bytes(broken)
    try:
        tensors = files.read_safetensors(folder / "flipped")
    except RefpeftError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(good)


@settings(max_examples=100, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(raw)))
def test_random_bytes_are_an_error_of_ours(folder, content):
    (folder / "random").write_bytes(content)
    with pytest.raises(RefpeftError):
        files.read_safetensors(folder / "random")


def test_a_missing_file_and_a_directory_are_errors_of_ours(tmp_path):
    for read in (files.read_safetensors, files.read_json):
        with pytest.raises(RefpeftError, match="cannot be read: No such file"):
            read(tmp_path / "none")
        with pytest.raises(RefpeftError, match="cannot be read: Is a directory"):
            read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b"1" * 9000])
def test_a_file_that_is_no_json_object_is_an_error_of_ours(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RefpeftError, match=r"x\.json: "):
        files.read_json(tmp_path / "x.json")

"""The kind of a weights file is found from its content, and what is wrong with it is one line."""

import io
import json
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from resjax.transfer.files import read_arrays

BIT = "resnet/block1/unit01/a/group_norm/gamma"


@pytest.fixture
def arrays():
    numbers = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    return {"conv1.weight": numbers, "bn1.num_batches_tracked": np.array(3)}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights"])
def test_safetensors_are_recognized_by_their_content(name, arrays, tmp_path):
    save_file(arrays, tmp_path / name, metadata={"format": "pt"})
    found = read_arrays(tmp_path / name)
    assert (found.format, found.metadata) == ("safetensors", {"header": {"format": "pt"}})
    assert found.arrays.keys() == arrays.keys()
    np.testing.assert_array_equal(found.arrays["conv1.weight"], arrays["conv1.weight"])
    assert found.arrays["bn1.num_batches_tracked"].dtype == np.int64
    assert found.notes == ()


def raw_safetensors(kind, shape, data):
    header = json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}})
    return struct.pack("<Q", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    ("kind", "dtype", "how"),
    [("F16", np.float16, "exactly"), ("BF16", ml_dtypes.bfloat16, "exactly"),
     ("F64", np.float64, "with rounding")],
)  # fmt: skip
def test_other_floats_are_converted_to_float32_with_a_note(kind, dtype, how, tmp_path):
    numbers = np.array([1 / 3, -2, 2**-14], dtype)
    (tmp_path / "w").write_bytes(raw_safetensors(kind, [3], numbers.tobytes()))
    found = read_arrays(tmp_path / "w")
    assert found.arrays["w"].dtype == np.float32
    np.testing.assert_array_equal(found.arrays["w"], numbers.astype(np.float32))
    assert found.notes == (f"{np.dtype(dtype).name} weights were converted to float32, {how}",)


def test_numbers_beyond_float32_are_refused(tmp_path, refusal):
    np.savez(tmp_path / "w.npz", w=np.array([1e300]))
    assert "'w' holds numbers beyond the range of float32" in refusal(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", w=np.array([np.inf]))
    assert np.isinf(read_arrays(tmp_path / "w.npz").arrays["w"])


def test_an_unknown_dtype_is_refused_by_name(tmp_path, refusal):
    (tmp_path / "w").write_bytes(raw_safetensors("F8_E4M3", [1], b"\0"))
    assert "'w' has a type that NumPy lacks: " in refusal(tmp_path / "w")


def test_a_folder_of_the_hub_is_read_with_its_metadata(arrays, tmp_path, refusal):
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"depths": [3, 4, 6, 3]}')
    (tmp_path / "preprocessor_config.json").write_text('{"crop_pct": 0.875}')
    found = read_arrays(tmp_path)
    assert found.metadata == {
        "config": {"depths": [3, 4, 6, 3]},
        "preprocessor": {"crop_pct": 0.875},
    }
    assert read_arrays(tmp_path / "model.safetensors").metadata == found.metadata
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json: is damaged, not JSON" in refusal(tmp_path)


def test_shards_are_combined_and_missing_arrays_named(arrays, tmp_path, refusal):
    placed = {}
    for number, (name, array) in enumerate(arrays.items(), 1):
        placed[name] = f"model-0000{number}-of-00002.safetensors"
        save_file({name: array}, tmp_path / placed[name])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    assert read_arrays(tmp_path).arrays.keys() == arrays.keys()
    index.write_text(json.dumps({"weight_map": placed | {"fc.bias": placed["conv1.weight"]}}))
    assert "lack 'fc.bias'" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    assert "is outside the folder; refused" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": placed | {"a": "gone.safetensors"}}))
    assert "cannot be read: No such file" in refusal(tmp_path)


def test_a_folder_needs_exactly_one_weights_file(arrays, tmp_path, refusal):
    assert "has no safetensors file" in refusal(tmp_path)
    save_file(arrays, tmp_path / "a.safetensors")
    assert read_arrays(tmp_path).arrays.keys() == arrays.keys()
    save_file(arrays, tmp_path / "b.safetensors")
    assert "has several safetensors files" in refusal(tmp_path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_keeps_names_with_slashes_orders_and_bytes(write, tmp_path):
    numbers = np.arange(6, dtype=">f4").reshape(2, 3)
    write(tmp_path / "bit.npz", **{BIT: numbers, "fortran": np.asfortranarray(numbers)})
    found = read_arrays(tmp_path / "bit.npz")
    assert found.format == "npz"
    assert found.arrays[BIT].dtype == np.float32
    assert found.arrays[BIT].dtype.isnative
    np.testing.assert_array_equal(found.arrays[BIT], numbers)
    np.testing.assert_array_equal(found.arrays["fortran"], numbers)
    assert found.notes == ()


def npz(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("w.npy", content)
    return path


def npy(shape, data=b"", dtype="<f4"):
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy((1 << 40,)), "'w.npy'"),
        (npy((1 << 30,)), "'w.npy'"),
        (npy((-1, -4), bytes(16)), "'w.npy'"),
        (npy((4,), bytes(15)), "expected 16 bytes got 15"),
        (npy((1,), bytes(8), "|O"), "Object arrays cannot be loaded"),
        (npy((1,), bytes(8), "<U2"), "holds <U2, not numbers"),
        (b"\x93NUMPY\x09\x00", "version"),
        (b"no array", "magic"),
        (b"", "'w.npy'"),
    ],
)
def test_npz_with_hostile_headers_is_refused(content, says, tmp_path, refusal):
    assert says in refusal(npz(tmp_path / "w.npz", content))


def test_a_zip_bomb_is_refused(tmp_path, refusal):
    bomb = npz(tmp_path / "w.npz", npy((1 << 25,), bytes(1 << 27)), zipfile.ZIP_DEFLATED)
    assert "16 times its size in memory; refused" in refusal(bomb)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b"\x80\x04\x95", "is a pickle that torch.save did not write; refused"),
        (b"\x89PNG\r\n\x1a\n", "is not a known weights file"),
        (b"PK\x03\x04", "truncated or damaged zip archive"),
        (b"\x89HDF\r\n\x1a\n", "truncated or damaged HDF5"),
        (b"\xff" * 8 + b"{", "truncated or damaged safetensors"),
    ],
)
def test_other_files_are_refused_in_one_line(content, says, tmp_path, refusal):
    (tmp_path / "w.pth").write_bytes(content)
    line = refusal(tmp_path / "w.pth")
    assert says in line
    assert "w.pth: " in line


def test_missing_files_and_files_without_floats_are_refused(tmp_path, refusal):
    assert "cannot be read: No such file" in refusal(tmp_path / "gone.pth")
    np.savez(tmp_path / "w.npz", w=np.arange(3))
    assert "none of its arrays contains floats" in refusal(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        file.writestr("photo.png", b"")
    assert "without weights from torch, Keras or NumPy" in refusal(tmp_path / "w.zip")


def test_truncated_safetensors_are_refused(arrays, tmp_path, refusal):
    content = save(arrays)
    for length in range(len(content)):
        (tmp_path / "w").write_bytes(content[:length])
        refusal(tmp_path / "w")


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@given(data=st.data())
def test_flipped_bytes_end_in_arrays_or_one_line(kind, data, tmp_path_factory, outcome):
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 1), np.float16)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    content = bytearray(save(arrays) if kind == "safetensors" else file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / f"flipped.{kind}"
    path.write_bytes(content)
    assert len(outcome(path)) == 1

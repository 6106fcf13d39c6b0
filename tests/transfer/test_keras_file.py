"""Keras's three layouts hold the same arrays, and no file leads to another."""

import json
import sys
import zipfile

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resjax.transfer import keras_file
from resjax.transfer.files import read_arrays


@pytest.mark.parametrize("name", ["keras2.h5", "keras3.weights.h5", "model.keras"])
def test_all_layouts_have_the_same_names_and_arrays(name, foreign, same):
    found = read_arrays(foreign / name)
    assert found.format == "keras"
    same(found.arrays, foreign / "keras.npz")


def test_a_keras_file_holds_the_config_of_its_model(foreign):
    layers = read_arrays(foreign / "model.keras").metadata["config"]["config"]["layers"]
    assert [layer["config"]["name"] for layer in layers][1:] == [
        "conv1_conv",
        "conv1_bn",
        "conv2_conv",
    ]


@pytest.fixture
def without_names(foreign, tmp_path):
    """Weights as the first versions of Keras 3 wrote them."""
    path = tmp_path / "old.weights.h5"
    path.write_bytes((foreign / "keras3.weights.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file.visititems(lambda _, item: item.attrs.pop("name", None) and None)
    return path


def test_numbered_weights_without_names_are_refused_with_the_remedy(without_names, refusal):
    assert "its layers have no names (layers/" in refusal(without_names)


def test_the_config_of_a_keras_file_names_its_layers(without_names, foreign, same, tmp_path):
    path = tmp_path / "old.keras"
    with zipfile.ZipFile(foreign / "model.keras") as model, zipfile.ZipFile(path, "w") as old:
        old.writestr("config.json", model.read("config.json"))
        old.write(without_names, "model.weights.h5")
    same(read_arrays(path).arrays, foreign / "keras.npz")


@pytest.fixture
def write(tmp_path):
    """Writes the layout of Keras 2: `write({layer: {weight: array}})`, then `change(file)`."""

    def file(layers, change=lambda file: None):
        path = tmp_path / "network.h5"
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = [layer.encode() for layer in layers]
            for layer, weights in layers.items():
                group = file.create_group(layer)
                group.attrs["weight_names"] = [name.encode() for name in weights]
                for name, array in weights.items():
                    group[name] = array
            change(file)
        return path

    return file


ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("layer", "weight", "name"),
    [
        ("conv1_conv", "conv1_conv/kernel:0", "conv1_conv/kernel"),
        ("conv1_conv", "conv1_conv_1/kernel:0", "conv1_conv/kernel"),
        ("conv1", "conv1_W:0", "conv1/kernel"),
        ("conv1", "conv1_b:0", "conv1/bias"),
        ("bn_conv1", "bn_conv1_running_std:0", "bn_conv1/moving_variance"),
        ("resnet", "resnet/conv1_conv/kernel", "conv1_conv/kernel"),
    ],
)
def test_weights_of_all_versions_have_the_same_names(layer, weight, name, write):
    assert list(read_arrays(write({layer: {weight: ONES}})).arrays) == [name]


def test_layers_of_a_nested_model_stay_separate(write):
    names = ("conv1_conv/kernel:0", "conv1_bn/gamma:0")
    found = read_arrays(write({"resnet50": dict.fromkeys(names, ONES), "fc": {"fc/bias": ONES}}))
    assert list(found.arrays) == ["conv1_conv/kernel", "conv1_bn/gamma", "fc/bias"]


def another(path):
    """A file beside that a hostile one would have read."""
    with h5py.File(path, "w") as file:
        file["secret"] = ONES
    return path


@pytest.mark.parametrize("kind", ["external", "soft"])
@pytest.mark.parametrize("place", ["conv", "conv/conv/kernel"])
def test_links_are_not_followed(kind, place, write, tmp_path, refusal):
    secret = another(tmp_path / "secret.h5")
    links = {"external": h5py.ExternalLink(secret, "/secret"), "soft": h5py.SoftLink("/other")}

    def change(file):
        file["other"] = ONES
        del file[place]
        file[place] = links[kind]

    assert "has a link there; refused" in refusal(write({"conv": {"conv/kernel": ONES}}, change))


@pytest.mark.parametrize(
    "options",
    [
        {"external": "secret.bin"},
        {"chunks": (3,)},
        {"chunks": (3,), "compression": "gzip"},
        {"dtype": h5py.string_dtype()},
        {"dtype": h5py.ref_dtype},
    ],
)
def test_external_and_compressed_arrays_are_refused(options, write, tmp_path, refusal):
    if "external" in options:
        options = {"external": [(str(tmp_path / "secret.bin"), 0, 12)]}

    def change(file):
        del file["conv/conv/kernel"]
        file["conv"].create_dataset("conv/kernel", (3,), **{"dtype": "f4", **options})

    assert "not a plain array; refused" in refusal(write({"conv": {"conv/kernel": ONES}}, change))


def test_a_virtual_array_is_refused(write, tmp_path, refusal):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(another(tmp_path / "secret.h5"), "secret", (3,))

    def change(file):
        del file["conv/conv/kernel"]
        file.create_virtual_dataset("conv/conv/kernel", layout)

    assert "not a plain array; refused" in refusal(write({"conv": {"conv/kernel": ONES}}, change))


def test_an_array_larger_than_its_file_is_refused(write, refusal):
    def change(file):
        del file["conv/conv/kernel"]
        file["conv"].create_dataset("conv/kernel", (1 << 40,), "f4")  # nothing of it is written

    assert "would fill more memory than the file" in refusal(
        write({"conv": {"conv/kernel": ONES}}, change)
    )


def test_recursive_groups_are_refused(tmp_path, refusal):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_group("layers")["layers"] = file["/"]
    assert "names no layers" in refusal(tmp_path / "w.h5")


def test_other_hdf5_files_are_refused(tmp_path, write, refusal):
    assert "names no layers" in refusal(another(tmp_path / "data.h5"))
    assert "lacks 'conv'" in refusal(
        write({"conv": {}}, lambda file: file.move("conv", "elsewhere"))
    )


def test_a_missing_h5py_is_one_line(foreign, monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install 'resjax[keras]'" in refusal(foreign / "keras2.h5")


@pytest.mark.parametrize("config", [b"", b"[" * 100_000, b"3", b'{"config": 3}'])
def test_an_invalid_config_is_refused(config, without_names, tmp_path, refusal):
    path = tmp_path / "w.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", config)
        file.write(without_names, "model.weights.h5")
    refusal(path)


def test_layers_of_a_config_are_counted_by_class():
    kinds = {"a": "Conv2D", "b": "BatchNormalization", "c": "Conv2D", "d": "GlobalAveragePooling2D"}
    layers = [{"class_name": kind, "config": {"name": name}} for name, kind in kinds.items()]
    assert keras_file._layer_names(json.loads(json.dumps({"config": {"layers": layers}}))) == {
        "layers/conv2d": "a",
        "layers/batch_normalization": "b",
        "layers/conv2d_1": "c",
        "layers/global_average_pooling2d": "d",
    }


@pytest.mark.parametrize("name", ["keras2.h5", "keras3.weights.h5", "model.keras"])
def test_a_truncated_file_is_refused(name, foreign, tmp_path, refusal):
    content = (foreign / name).read_bytes()
    for length in (3, 9, 100, 700, 3000, 9000, len(content) - 1):
        (tmp_path / name).write_bytes(content[:length])
        refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["keras2.h5", "keras3.weights.h5", "model.keras"])
@settings(max_examples=10)
@given(data=st.data())
def test_flipped_bytes_end_in_arrays_or_one_line(name, data, foreign, tmp_path_factory, outcome):
    content = bytearray((foreign / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / f"flipped-{name}"
    path.write_bytes(content)
    assert len(outcome(path)) == 1


@pytest.mark.parametrize(
    ("trial", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes on it"),
        ("while True: pass", "does not finish reading it"),
    ],
)
def test_a_file_that_crashes_or_hangs_the_library_is_refused(
    trial, says, foreign, monkeypatch, refusal
):
    monkeypatch.setattr(keras_file, "_TRIAL", trial)
    monkeypatch.setattr(keras_file, "_SECONDS", 1)
    assert says in refusal(foreign / "keras2.h5")


def test_a_named_type_instead_of_an_array_is_refused(write, refusal):
    def change(file):
        del file["conv/conv/kernel"]
        file["conv/conv/kernel"] = np.dtype("f4")

    assert "not a plain array; refused" in refusal(write({"conv": {"conv/kernel": ONES}}, change))

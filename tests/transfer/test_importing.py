"""What is imported is the original; what is not all accounted for is refused."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resjax.cli import main
from resjax.errors import UserError
from resjax.transfer import weights as folders
from resjax.transfer.exporting import export_torchvision
from resjax.transfer.importing import Options, import_weights
from resjax.transfer.weights import flatten

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "parity"
FAST = ("resnet18", "resnet50d", "resnetv2_50x1_bit", "resnet_18_hugging_face", "resnet50_keras")


@pytest.fixture(scope="module")
def parity(script):
    """That compared the originals."""
    return script("parity")


ORIGINALS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in FAST else [pytest.mark.slow])
    for path in sorted(RESULTS.glob("*.json"))
]


def written(parity, record, folder):
    """A file under the original's names, with the weights that the original had."""
    if "Keras" in record["name"]:
        return written_by_keras(parity, record["names"], folder / "weights.h5")
    arrays = parity.fill({name: tuple(shape) for name, shape in record["names"].items()})
    save_file(arrays, folder / "model.safetensors")
    if record["config"]:
        (folder / "config.json").write_text(json.dumps(record["config"]))
    return folder


def written_by_keras(parity, names, path):
    with h5py.File(path, "w") as file:
        layers = list(dict.fromkeys(name.partition("/")[0] for name in names))
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer in layers:
            mine = [name for name in names if name.startswith(f"{layer}/")]
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{name}:0".encode() for name in mine]
            for name in mine:
                shape = tuple(names[name])
                array = parity.filled(name, shape, int(np.prod(shape[:-1])))
                group.create_dataset(f"{name}:0", data=array)
    return path


@pytest.mark.parametrize("path", ORIGINALS)
def test_an_imported_network_has_the_outputs_of_the_original(path, parity, tmp_path):
    record = json.loads(path.read_text())
    found = import_weights(str(written(parity, record, tmp_path)))
    for shape in parity.SHAPES[1:] if path.stem in FAST else parity.SHAPES:
        ours = parity.outputs(found, parity.images(shape))
        theirs = record["outputs"]["x".join(map(str, shape[:3]))]
        for name, expected in theirs.items():
            got = parity.sample(ours[name])
            assert np.abs(np.subtract(got, expected)).max() <= 1e-4 * expected[-1], name


def test_every_original_was_within_the_tolerance_when_it_was_measured():
    for path in RESULTS.glob("*.json"):
        differences = json.loads(path.read_text())["differences"]
        assert differences.pop("gradients") <= 1e-3
        for outputs in differences.values():
            assert max(ours for ours, _ in outputs.values()) <= 1e-4


@pytest.fixture
def file(weights, tmp_path):
    """A small network as torchvision would save it: `file(change)` gives the path."""

    def write(change=lambda arrays: arrays):
        exported = tmp_path / "exported.safetensors"
        export_torchvision(weights, exported)
        path = tmp_path / "model.safetensors"
        save_file(change(load_file(exported)), path)  # without metadata
        exported.unlink()
        return str(path)

    return write


def test_depth_block_width_stem_classes_and_channels_are_recognized(weights, file):
    found = import_weights(file())
    assert found.model == {**weights.model}
    for path, array in flatten(weights.variables).items():
        np.testing.assert_array_equal(flatten(found.variables)[path], array)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"depth": 26, "block": "bottleneck"}, {"depth": 26}),
        (
            {"depth": 14, "block": "bottleneck", "block_options": {"groups": 4, "group_width": 16}},
            {"block_options": {"groups": 4, "group_width": 16, "stride_in_1x1": False}},
        ),
        ({"stem": "deep", "shortcut": "project_avg"}, {"stem": "deep", "shortcut": "project_avg"}),
        ({"stem": "deep"}, {"stem": "deep", "shortcut": "project"}),
        ({"block_options": {"se_reduction": 4}}, {"block_options": {"se_reduction": 4}}),
        ({"widen": 2}, {"widen": 2, "width": 8}),
        ({"shortcut": "project_all"}, {"shortcut": "project_all"}),
        ({"family": "cifar", "depth": 14, "shortcut": "project"}, {"family": "cifar", "depth": 14}),
    ],
    ids=str,
)
def test_architectures_are_recognized(make_weights, tmp_path, fields, expected):
    path = tmp_path / "file.safetensors"
    export_torchvision(make_weights(**fields), path)
    save_file(load_file(path), path)  # without what the exporter says
    found = import_weights(str(path)).model
    assert {name: found[name] for name in expected} == expected


def without(*names):
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


def detector(arrays):
    kept = without("fc.weight", "fc.bias")(arrays)
    body = {f"backbone.body.{name}": array for name, array in kept.items()}
    return body | {"rpn.head.conv.weight": np.zeros((4, 4, 3, 3), np.float32)}


def squeezenet(arrays):
    return {f"features.{n}.squeeze.weight": np.ones((2, 2, 1, 1), np.float32) for n in range(5)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("layer2.0.bn1.running_var"), "missing: batch_stats/stage2/block1/BatchNorm_0/var"),
        (lambda a: a | {"aux.weight": a["fc.weight"]}, "left over: aux.weight"),
        (
            lambda a: a | {"layer1.0.conv2.weight": a["layer1.0.conv2.weight"][:, :4].copy()},
            r"of a wrong shape: params/stage1/block1/Conv_1/kernel is \(3, 3, 4, 8\)",
        ),
        (without("fc.weight", "fc.bias"), "it has no head; --backbone imports the rest"),
        (detector, "--prefix=backbone.body. --backbone"),
        (squeezenet, "is not a known ResNet; its arrays are named features.0.squeeze.weight"),
        (
            lambda a: {name: x for name, x in a.items() if "downsample" not in name},
            "it has no projections",
        ),
    ],
    ids=["missing", "left over", "shape", "no head", "detector", "SqueezeNet", "plain or padded"],
)
def test_an_incomplete_network_is_one_line(file, change, told):
    with pytest.raises(UserError, match=told) as caught:
        import_weights(file(change))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_backbone_of_a_detector_is_imported_by_its_prefix(file, weights):
    found = import_weights(file(detector), Options(prefix="backbone.body.", without_head=True))
    assert "head" not in found.variables["params"]
    assert found.model["classes"] == 0
    stem = found.variables["params"]["stem"]["Conv_0"]["kernel"]
    np.testing.assert_array_equal(stem, weights.variables["params"]["stem"]["Conv_0"]["kernel"])


def test_half_precision_is_converted_to_float32_with_a_note(file):
    told = []
    halves = file(lambda a: {n: x.astype(np.float16) if x.ndim else x for n, x in a.items()})
    found = import_weights(halves, notify=told.append)
    assert all(array.dtype == np.float32 for array in flatten(found.variables).values())
    assert "float16" in told[0]


def test_a_network_that_differs_in_layers_without_weights_is_refused(file, tmp_path):
    file()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetblur50"}))
    with pytest.raises(UserError, match="resnetblur50 has layers without weights"):
        import_weights(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10"}))
    import_weights(str(tmp_path))


def test_configs_beside_the_weights_set_the_preprocessing(file, tmp_path):
    file()
    given = {
        "input_size": [3, 96, 96],
        "crop_pct": 0.75,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    content = {"architecture": "resnet10", "pretrained_cfg": given}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = import_weights(str(tmp_path))
    made = found.preprocessing
    assert (made.size, made.shorter_side, made.interpolation) == (96, 128, "bicubic")
    np.testing.assert_allclose(found.statistics.mean, given["mean"], rtol=1e-6)


def test_the_command_writes_a_weights_folder(file, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    command = ["import", file(), f"--out={tmp_path / 'out'}", f"--class-names={names}"]
    assert main([*command, "--image-size=64"]) == 0
    assert re.search(r"depth 10, basic blocks.*5 classes", capsys.readouterr().out)
    found = folders.load(tmp_path / "out")
    assert found.class_names == ("a", "b", "c", "d", "e")
    assert (found.preprocessing.size, found.preprocessing.shorter_side) == (64, 73)
    first, again = flatten(found.variables), flatten(import_weights(file()).variables)
    assert all((first[path] == again[path]).all() for path in again)


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert main(["import", str(tmp_path / "none.pth"), f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()

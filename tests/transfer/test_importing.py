"""What is imported is the original; what is not all accounted for is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resjax.cli import main
from resjax.errors import UserError
from resjax.transfer import importing
from resjax.transfer import weights as folders
from resjax.transfer.assumptions import Hidden
from resjax.transfer.exporting import export_torchvision
from resjax.transfer.importing import Options, import_weights
from resjax.transfer.weights import flatten
from resjax.xla.compile_options import quick_compile

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "parity"
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
    assert {path.stem for path in RESULTS.glob("*.json")} > {*FAST}
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
    assert found.model == {**weights.model, "bn_unbiased": True}
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


# What arrays do not show. `variants.json` holds the outputs of the networks in PyTorch and timm.

VARIANTS = json.loads((Path(__file__).parent / "files" / "variants.json").read_text())


@pytest.fixture
def variant(parity, tmp_path):
    """Writes a network of `VARIANTS`: `variant(name, file)` gives the path."""

    def write(name, file="network.safetensors", **changes):
        arrays = parity.fill(VARIANTS[name]["shapes"])
        path = tmp_path / file
        save_file(
            {f"{changes.get('prefix', '')}{key}": array for key, array in arrays.items()}, path
        )
        return str(path)

    return write


def error(found, name, parity):
    """The largest difference of the logits from the original's, relative to the largest logit."""
    apply = jax.jit(found.network(loop="unroll").apply, compiler_options=quick_compile())
    logits = np.asarray(apply(found.variables, parity.images((2, 32, 32, 3))))
    expected = np.array(VARIANTS[name]["logits"])
    return np.abs(logits - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "file", "hidden"),
    [
        ("average", "resnetaa10d-1234abcd.safetensors", {}),
        ("average_bottleneck", "w", {"antialias": "average", "stem_pool": "average"}),
        ("blur", "resnetblur10d.safetensors", {}),
        ("dilated", "w", {"dilated_stages": 2}),
        ("option_a", "w", {"shortcut": "pad_center"}),
        ("four_stages", "w", {}),
        ("pooled", "w", {"stem_pool": "max"}),
    ],
)
def test_what_arrays_do_not_show_is_told_or_named(name, file, hidden, variant, parity):
    found = import_weights(variant(name, file), Options(hidden=Hidden(**hidden)))
    assert error(found, name, parity) < 1e-5


@pytest.mark.parametrize("name", ["average", "blur", "dilated", "pooled"])
def test_what_is_assumed_is_said_with_the_option_that_changes_it(name, variant):
    told = []
    import_weights(variant(name), notify=told.append)
    (line,) = told
    assert "assumed, as the file does not show it: " in line
    options = ["--stem-pool", "--antialias", "--bn-epsilon"]
    options += ["--v1", "--dilated-stages"] if name == "dilated" else []
    assert all(f"({option})" in line for option in options)


def test_the_name_of_the_architecture_in_a_checkpoint_counts(variant, monkeypatch):
    path, read = variant("average"), importing.read_arrays

    def named(*arguments):
        found = read(*arguments)
        return replace(found, metadata={"architecture": "resnetaa10d"})

    monkeypatch.setattr(importing, "read_arrays", named)
    assert import_weights(path).model["block_options"] == {"antialias": "average"}


def test_the_backbone_of_deeplab_is_dilated_as_its_head_shows(parity, tmp_path, variant):
    backbone = load_file(variant("dilated", prefix="backbone."))
    arrays = {name: array for name, array in backbone.items() if ".fc." not in name}
    around = {"classifier.0.convs.0.0.weight": np.zeros((4, 4, 1, 1), np.float32)}
    save_file(arrays | around, tmp_path / "deeplab.safetensors")
    path = str(tmp_path / "deeplab.safetensors")
    with pytest.raises(UserError, match=r"with --prefix=backbone\. --backbone$"):
        import_weights(path)
    found = import_weights(path, Options(prefix="backbone.", without_head=True))
    assert found.model["dilated_stages"] == 2


@pytest.mark.parametrize("write", [save_file, lambda arrays, path: np.savez(path, **arrays)])
def test_a_config_beside_a_file_of_any_format_is_read(write, parity, make_weights, tmp_path):
    record = json.loads((RESULTS / "resnet_50_v1_hugging_face.json").read_text())
    arrays = parity.fill({name: tuple(shape) for name, shape in record["names"].items()})
    write(arrays, tmp_path / "weights.npz")
    (tmp_path / "config.json").write_text(json.dumps(record["config"]))
    assert record["config"]["downsample_in_bottleneck"]
    found = import_weights(str(tmp_path / "weights.npz"))
    assert found.model["block_options"]["stride_in_1x1"]


def test_a_file_named_as_a_network_that_cannot_be_made_is_refused(variant):
    with pytest.raises(UserError, match="Caffe's ResNets, which take BGR images"):
        import_weights(variant("average", "resnet50_caffe-788b5fa3.pth"))


def test_a_config_of_something_else_is_no_description(file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"name": "digits"}, "model": {}}))
    import_weights(file())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "resnet", "hidden_act": "gelu"}, "its activation is gelu"),
        ({"model_type": "resnet", "downsample_in_first_stage": True}, "its first stage strides"),
        ({"architecture": "resnet10", "model_args": {"act_layer": "silu"}}, "change act_layer"),
    ],
)
def test_a_config_of_a_network_that_cannot_be_made_is_refused(file, config, told, tmp_path):
    path = file()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        import_weights(path)


# Hints.


def momentum_contrast(arrays):
    """As MoCo v2 saves: two encoders with a head of two layers, and a queue."""
    kept = without("fc.weight", "fc.bias")(arrays)
    head = {
        f"fc.{layer}.{leaf}": np.ones((8, 8)) for layer in (0, 2) for leaf in ("weight", "bias")
    }
    encoders = {
        f"module.encoder_{which}.{name}": np.array(array)
        for which in "qk"
        for name, array in (kept | head).items()
    }
    return encoders | {"module.queue": np.ones((8, 4))}


def lightning(arrays):
    return {f"model.{name}": array for name, array in arrays.items()} | {"loss.w": np.ones(2)}


def self_supervised(arrays):
    kept = without("fc.weight", "fc.bias")(arrays)
    return kept | {
        "projection_head.0.weight": np.ones((2, 2)),
        "prototypes.weight": np.ones((2, 2)),
    }


@pytest.mark.parametrize("change", [momentum_contrast, lightning, self_supervised, detector])
def test_a_hint_works_when_it_is_followed(file, change, tmp_path, capsys):
    path = file(change)
    assert main(["import", path, f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    options = re.findall(r"--(?:prefix=\S+|backbone)", re.sub(r"\(or .*\)", "", told))
    assert options
    assert main(["import", path, f"--out={tmp_path / 'out'}", *options]) == 0
    assert ("--backbone" in options) == (change is not lightning)


def test_a_hint_that_would_fail_is_not_given(file):
    def broken(arrays):
        return lightning(without("layer2.0.bn1.running_var")(arrays))

    with pytest.raises(UserError, match=r"begins with 'model.' in it: .*missing: ") as caught:
        import_weights(file(broken))
    assert "--prefix" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net."])
def test_a_prefix_of_all_names_is_removed_with_a_note(prefix, file, weights):
    told = []
    path = file(lambda arrays: {f"{prefix}{name}": array for name, array in arrays.items()})
    found = import_weights(path, notify=told.append)
    assert found.model == {**weights.model, "bn_unbiased": True}
    assert f"the prefix {prefix!r} was removed from every name" in told[0]


def test_an_export_without_its_metadata_is_imported_once_its_shortcut_is_named(
    make_weights, tmp_path
):
    given = make_weights(family="cifar", depth=14, shortcut="pad")
    path = tmp_path / "file.safetensors"
    export_torchvision(given, path)
    save_file(load_file(path), path)
    with pytest.raises(UserError, match=r"--shortcut=pad .*pad_center .* or none"):
        import_weights(str(path))
    found = import_weights(str(path), Options(hidden=Hidden(shortcut="pad")))
    assert found.model == {**given.model, "bn_unbiased": True}
    assert all((a == b).all() for a, b in zip(*map(sorted_arrays, (found, given)), strict=True))


def sorted_arrays(weights):
    return [array for _, array in sorted(flatten(weights.variables).items())]


def test_options_about_foreign_files_do_not_apply_to_our_own(weights, tmp_path, capsys):
    folders.save(weights, tmp_path / "own")
    command = ["import", str(tmp_path / "own"), f"--out={tmp_path / 'out'}"]
    assert main([*command, "--stem-pool=none"]) == 2
    assert "resjax wrote it" in capsys.readouterr().err
    assert main(command) == 0


def test_weights_with_a_mean_image_keep_their_image_size(weights, tmp_path, capsys):
    mean = np.full((32, 32, 3), 0.5, np.float32)
    given = replace(weights, statistics=weights.statistics._replace(mean=mean))
    folders.save(given, tmp_path / "w")
    command = ["import", str(tmp_path / "w"), f"--out={tmp_path / 'out'}"]
    assert main([*command, "--image-size=64"]) == 2
    assert "subtract a mean image of 32 pixels" in capsys.readouterr().err
    assert main([*command, "--image-size=32"]) == 0


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert main(["import", str(tmp_path / "none.pth"), f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()

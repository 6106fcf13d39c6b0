"""Files from strangers name no code, and fill neither memory nor time out of proportion."""

import io
import json
import os
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import resjax
from resjax import user_code
from resjax.cli import main
from resjax.disk import write_checksums
from resjax.errors import UserError
from resjax.inference.images import each_image, find_images
from resjax.transfer import keras_file
from resjax.transfer.exporting import export_torchvision
from resjax.transfer.weights import save

TIMM = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
EVIL = "open('executed', 'w').close()\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder; modules that the user has named are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_code, "_trusted", set())
    return tmp_path


def named(weights, **fields):
    return replace(weights, model={**weights.model, **fields})


def as_folder(weights):
    save(weights, Path("weights"))
    return "weights"


def as_export(weights):
    path = Path("w.safetensors")
    export_torchvision(weights, path)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size].replace(b'\\"basic\\"', b'\\"evil:Block\\"')
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    return "w.safetensors"


def as_run(weights):
    Path("run/checkpoints/1").mkdir(parents=True)
    config = {"model": {"block": "evil:Block"}, "data": {"name": "digits"}}
    Path("run/config.json").write_text(json.dumps(config))
    return "run"


@pytest.mark.parametrize(
    "command", ["predict --checkpoint={} x.png", "features --checkpoint={} x.png --out=f.npz",
                "import {} --out=out", "export {} --format=stablehlo --out=p",
                "train --config=c.py --config.transfer.weights={} --workdir=w"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["block", "shortcut"])
def test_a_weights_folder_imports_no_module(command, kind, weights, folder, capsys):
    (folder / "evil.py").write_text(EVIL)
    (folder / "x.png").write_bytes(b"")
    (folder / "c.py").write_text("from resjax.config import default_config as get_config\n")
    as_folder(named(weights, **{kind: "evil:Block"}))
    assert main(command.format("weights").split()) == 2
    told = capsys.readouterr().err
    assert "names 'evil:Block', code that is not part of resjax" in told
    assert ("--code=evil" in told) != (f"model.{kind}=evil:Block" in told)
    assert not (folder / "executed").exists()


def test_metadata_of_an_export_import_no_module(weights, folder, capsys):
    (folder / "evil.py").write_text(EVIL)
    assert main(["import", as_export(weights), "--out=out"]) == 2
    assert "names 'evil:Block'" in capsys.readouterr().err
    assert not (folder / "executed").exists()


def test_the_config_of_a_run_imports_no_module(weights, folder, capsys):
    (folder / "evil.py").write_text(EVIL)
    as_run(weights)
    assert main(["evaluate", "--workdir=run"]) == 2
    assert "run: names 'evil:Block'" in capsys.readouterr().err
    assert not (folder / "executed").exists()


def test_a_module_that_the_user_names_is_imported(weights, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    source = "from resjax.models.blocks import BasicBlock\nclass Mine(BasicBlock):\n    pass\n"
    (folder / "blocks_of_mine.py").write_text(source)
    as_folder(named(weights, block="blocks_of_mine:Mine"))
    with pytest.raises(UserError, match="--code=blocks_of_mine"):
        resjax.load_pretrained("weights")
    command = ["import", "weights", "--out=out", "--code=blocks_of_mine"]
    assert main(command) == 0
    model, _ = resjax.load_pretrained("weights", code=["blocks_of_mine"])
    assert model.block.func.__name__ == "Mine"


def test_no_child_process_searches_the_current_folder(folder, foreign, monkeypatch, weights):
    for module in ("h5py", "pickle", "socket", "numpy", "signal"):
        (folder / f"{module}.py").write_text(EVIL)
    keras_file.read(foreign / "keras2.h5")
    from PIL import Image

    Image.new("RGB", (8, 8)).save("x.png")
    each_image(
        lambda images: images.reshape(len(images), -1).astype(np.float32),
        find_images([Path("x.png")]),
        replace(weights.preprocessing, size=8, shorter_side=8),
        workers=1,
    )
    assert not (folder / "executed").exists()


# Descriptions.


@pytest.mark.parametrize(
    "change",
    [
        *({"model": value} for value in (None, [], "basic", 3)),
        *({"model": {name: value}} for name in ("depth", "width", "block", "classes", "x")
          for value in (None, -1, "y", [1], {})),
        *({"model": {"stem_pool": value}} for value in (-1, "y", [1], {})),
        {"model": {"depth": 11}},
        {"model": {"classes": 7}},
        *({"preprocessing": value} for value in ([], "x", 3, {"size": 0})),
        *({"preprocessing": {name: value}}
          for name in ("size", "shorter_side", "channels", "squash", "interpolation", "x")
          for value in (None, -1, 1.5, "y", 10**9)),
        *({"statistics": value} for value in (None, [], 3, {})),
        *({"statistics": {name: value}} for name in ("mean", "std")
          for value in (None, "x", [0.5] * 100, [[1.0, "a"]], {}, [float("nan")] * 3)),
        {"statistics": {"std": [1.0, 0.0, 1.0]}},
        {"statistics": {"std": [1.0, -1.0, 1.0]}},
        *({"class_names": value} for value in (None, 3, "abcdef", [1, 2, 3, 4, 5], ["a"])),
        *({"source": value} for value in (3, "x", [1])),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "export"])
def test_a_description_of_wrong_types_or_values_is_one_line(change, kind, weights, folder, capsys):
    if kind == "export" and "source" in change:
        pytest.skip("an export has none")
    if kind == "folder":
        described = Path(as_folder(weights)) / "weights.json"
        described.write_text(changed(described.read_text(), change))
        write_checksums(Path("weights"))
        source = "weights"
    else:
        source = "w.safetensors"
        export_torchvision(weights, Path(source))
        with safe_open(source, "numpy") as file:
            text = changed(file.metadata()["resjax"], change)
        save_file(load_file(source), source, {"resjax": text})
    require_one_line(source, capsys)


def changed(text, change):
    """A description with another value, or with other values inside of one."""
    described = json.loads(text)
    for name, value in change.items():
        whole = not isinstance(value, dict) or not value
        described[name] = value if whole else described[name] | value
    return json.dumps(described)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", {"architecture": "r", "pretrained_cfg": value}) for value in (
            3, [1], "x", {"input_size": [3, 9, 9]},
            TIMM | {"mean": [0.5] * 100}, TIMM | {"std": [0] * 3},
            TIMM | {"crop_pct": 0}, TIMM | {"crop_pct": "x"}, TIMM | {"input_size": 3},
            TIMM | {"input_size": [3, 10**9, 10**9]}, TIMM | {"mean": None})),
        *(("config.json", {"architecture": "r", "model_args": value})
          for value in (3, [1], {"output_stride": [8]})),
        *(("config.json", {"model_type": "resnet", "hidden_act": value})
          for value in (3, None, [])),
        ("config.json", {"model_type": "resnet", "id2label": dict.fromkeys("abcde", "x")}),
        ("config.json", {"model_type": "resnet", "label_names": 5}),
        *(("preprocessor_config.json", {"size": value})
          for value in ("x", [], {"shortest_edge": "y"}, {"shortest_edge": 0}, -1)),
        *(("preprocessor_config.json", {"size": 32, "crop_pct": value}) for value in (0, "x", [])),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}),
        ("preprocessor_config.json", {"image_mean": "x"}),
        ("preprocessor_config.json", {"image_mean": [0.5] * 100}),
        ("preprocessor_config.json", {"resample": []}),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_wrong_types_or_values_is_one_line(name, content, weights, folder, capsys):
    export_torchvision(weights, Path("w.safetensors"))
    save_file(load_file("w.safetensors"), "w.safetensors")
    Path(name).write_text(json.dumps(content))
    require_one_line("w.safetensors", capsys)


def require_one_line(source, capsys):
    code, told = main(["import", source, "--out=out"]), capsys.readouterr().err
    assert code == 2, told
    assert told.splitlines()[-1].startswith("resjax: error: ")
    assert source in told
    assert "Traceback" not in told


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_of_the_users_umask(umask, weights, folder):
    before = os.umask(umask)
    try:
        as_folder(weights)
        export_torchvision(weights, Path("w.safetensors"))
    finally:
        os.umask(before)
    files = [Path("w.safetensors"), *Path("weights").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


# Memory and time.


def npy(shape, data=b"", dtype="<f4"):
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def lying_archive(path):
    """Half a gigabyte of zeros that claims to have 128 bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w.npy", npy((1 << 27,)) + bytes(1 << 29))
        real = file.getinfo("w.npy").file_size
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", real), struct.pack("<I", 128)))


def claiming_archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w.npy", npy((1 << 40,)))


def checkpoint(path, opcodes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("network/data.pkl", b"\x80\x02" + opcodes + b".")
        file.writestr("network/data/0", bytes(24))


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K\x06\x85K\x01\x85\x89NtR"
)


def size_bomb(path):
    """A list of a hundred thousand numbers that a call copies three hundred thousand times."""
    numbers = b"](" + b"K\x01" * 100_000 + b"eq\x00"
    checkpoint(path, numbers + b"0" + b"]" + b"ctorch\nSize\nh\x00\x85Ra" * 300_000)


def long_prefix(path):
    name = b"module." * 150_000 + b"layer1.0.conv1.weight"
    names = b"".join(
        b"X" + struct.pack("<I", len(name) + 1) + name + letter + TENSOR
        for letter in (b"a", b"b", b"c")
    )
    checkpoint(path, b"}(" + names + b"u")


def large_numbers(path):
    conv = np.ones((8, 8, 3, 3), np.float32)
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer9999.9999.conv1.weight")
    digits = f"layer{'9' * 10_000}.0.conv1.weight"
    save_file(dict.fromkeys((*names, digits, "layer²1.0.conv1.weight"), conv), path)


def many_names(path):
    conv = np.ones((1, 1, 1, 1), np.float32)
    names = [
        f"layer{stage}.{block}.conv1.weight" for stage in range(1, 200) for block in range(100)
    ]
    save_file(dict.fromkeys(("conv1.weight", *names), conv), path)


def many_networks(path):
    conv = np.ones((1, 1, 1, 1), np.float32)
    marks = "conv1.weight", "layer1.0.conv1.weight"
    save_file({f"net{n}.{mark}": conv for n in range(10_000) for mark in marks}, path)


def odd_shapes(path):
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight")
    save_file({name: np.ones((0, 2, 1), np.float32) for name in names}, path)


def nested_pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}, 2))


BOMBS = (
    *(lying_archive, claiming_archive, size_bomb, long_prefix, large_numbers, many_names),
    *(many_networks, odd_shapes, nested_pickle),
)


def test_no_file_fills_memory_or_time(tmp_path, read_within):
    for bomb in BOMBS:
        bomb(tmp_path / bomb.__name__)
    paths = [tmp_path / bomb.__name__ for bomb in BOMBS]
    found = read_within("resjax.train.load_weights:load_weights", paths, 400)
    assert set(found) == {bomb.__name__ for bomb in BOMBS}
    for name, each in found.items():
        assert each["outcome"], name
        assert "Traceback" not in each["outcome"], each["outcome"]
        assert "Unable to allocate" not in each["outcome"], each["outcome"]
        assert each["seconds"] < 15, name

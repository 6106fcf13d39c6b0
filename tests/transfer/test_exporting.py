"""What goes out in torchvision's format comes back as it was."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resjax.errors import UserError
from resjax.train.verify import verify
from resjax.transfer import weights as folders
from resjax.transfer.exporting import export_torchvision
from resjax.transfer.importing import import_weights
from resjax.transfer.weights import flatten

NETWORKS = [
    {},
    {"depth": 14, "block": "bottleneck", "block_options": {"se_reduction": 4}},
    {"stem": "deep", "shortcut": "project_avg"},
    {"family": "cifar", "depth": 8, "shortcut": "none", "channels": 1},
    {"bn_epsilon": 1e-3},
]


@pytest.mark.parametrize("fields", NETWORKS, ids=str)
def test_an_export_is_imported_bit_for_bit(make_weights, tmp_path, fields):
    epsilon = {"bn_epsilon": fields["bn_epsilon"]} if "bn_epsilon" in fields else {}
    made = make_weights(**{name: value for name, value in fields.items() if name not in epsilon})
    made = dataclasses.replace(made, model={**made.model, **epsilon})
    path = tmp_path / "net.safetensors"
    export_torchvision(made, path)
    back = import_weights(str(path))
    assert back.model == made.model
    assert (back.preprocessing, back.class_names) == (made.preprocessing, made.class_names)
    np.testing.assert_array_equal(back.statistics.mean, made.statistics.mean)
    arrays = flatten(made.variables)
    assert flatten(back.variables).keys() == arrays.keys()
    for name, array in flatten(back.variables).items():
        np.testing.assert_array_equal(array, arrays[name], name)


def test_a_foreign_file_is_exported_under_its_own_names(weights, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    export_torchvision(weights, first)
    save_file(load_file(first), first)  # as torch would, without what we add
    export_torchvision(import_weights(str(first)), second)
    theirs, ours = load_file(first), load_file(second)
    assert ours["bn1.num_batches_tracked"].shape == ()
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert (array.dtype, array.shape) == (ours[name].dtype, ours[name].shape)
        np.testing.assert_array_equal(array, ours[name], name)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"depth": 14, "block": "preact_bottleneck"}, "blocks are preact_bottleneck"),
        (
            {"depth": 14, "block": "bottleneck", "block_options": {"stride_in_1x1": True}},
            "stride in their first 1x1",
        ),
        ({"norm": "group", "width": 32}, "no batch norms"),
        ({"shortcut": "shortcut_gate"}, "shortcuts are shortcut_gate"),
    ],
)
def test_networks_that_torchvision_lacks_are_refused(make_weights, tmp_path, fields, told):
    with pytest.raises(UserError, match=told):
        export_torchvision(make_weights(**fields), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_changed_bit_in_a_weights_folder_is_an_error(weights, tmp_path):
    folders.save(weights, tmp_path)
    assert folders.load(tmp_path).model == weights.model
    assert not any(finding.damaged for finding in verify(tmp_path))
    path = tmp_path / folders.ARRAYS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{folders.ARRAYS} changed since it was saved"):
        folders.load(tmp_path)
    (finding,) = verify(tmp_path)
    assert finding.damaged

"""What the traced programs count: equal to the table of architectures, to the unit."""

import jax
import pytest
from flax import linen as nn

from resjax.models.count import Counts, count, layers
from resjax.models.presets import PRESETS
from resjax.models.resnet import build

CIFAR, IMAGENET = (32, 32, 3), (224, 224, 3)


@pytest.mark.parametrize(("name", "row"), PRESETS.items(), ids=PRESETS)
def test_the_counts_of_every_preset_are_those_of_its_program(name, row):
    shape = (row.image_size, row.image_size, 3)
    assert count(build(name), shape) == Counts(row.parameters, row.macs)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet56"])
def test_option_b_adds_2752_parameters_to_option_a(name):
    a, b = (count(build(name, shortcut=option), CIFAR) for option in ("pad", "project"))
    assert b.parameters - a.parameters == 2_752
    assert b.macs - a.macs == (16 * 16) * 16 * 32 + (8 * 8) * 32 * 64


@pytest.mark.parametrize("order", ["bn_after_addition", "relu_before_addition", "relu_preact"])
def test_an_order_of_activation_moves_layers_and_adds_none(order):
    blocks = ("basic", f"{order}_basic"), ("bottleneck", f"{order}_bottleneck")
    for depth, (usual, moved) in zip((14, 20), blocks, strict=True):
        fields = {"depth": depth, "shortcut": "project"}
        counts = [count(build({}, block=block, **fields), CIFAR) for block in (usual, moved)]
        assert counts[0] == counts[1]


def test_fixup_has_scalars_in_place_of_norms():
    """Five scalars per block, one after the stem's convolution, one before the classifier."""
    fixup, biases, norms = (
        count(build("cifar_resnet20", **fields), CIFAR).parameters
        for fields in ({"block": "fixup_basic"}, {"norm": "none"}, {})
    )
    channels = 7 * 16 + 6 * 32 + 6 * 64
    assert norms - biases == channels
    assert fixup == biases - channels + 9 * 5 + 2


@pytest.mark.parametrize(
    "name", ["cifar_plain56", "cifar_preact110", "resnext50_32x4d", "seresnet50"]
)
def test_scanned_and_unrolled_count_the_same(name):
    shape = (PRESETS[name].image_size,) * 2 + (3,)
    scanned, unrolled = (count(build(name, loop=loop), shape) for loop in ("scan", "unroll"))
    assert scanned == unrolled


@pytest.mark.parametrize(
    "name",
    ["cifar_resnet20", "cifar_wrn16_8", "plain18", "resnext50_32x4d", "seresnet50"],
)
def test_layers_sum_to_the_whole(name):
    row = PRESETS[name]
    table = layers(build(name), (row.image_size, row.image_size, 3))
    assert sum(layer.parameters for layer in table) == row.parameters
    assert sum(layer.macs for layer in table) == row.macs


def test_layers_come_in_the_order_in_which_they_run():
    table = layers(build("cifar_resnet8"), CIFAR)
    shown = [(layer.path, layer.kind, layer.output) for layer in table]
    assert shown[:6] == [
        ("stem/Conv_0", "Conv", (32, 32, 16)),
        ("stem/BatchNorm_0", "BatchNorm", (32, 32, 16)),
        ("stage1/block1/Conv_0", "Conv", (32, 32, 16)),
        ("stage1/block1/BatchNorm_0", "BatchNorm", (32, 32, 16)),
        ("stage1/block1/Conv_1", "Conv", (32, 32, 16)),
        ("stage1/block1/BatchNorm_1", "BatchNorm", (32, 32, 16)),
    ]
    assert shown[-1] == ("head", "Dense", (10,))


def weight_layers(name):
    """Convolutions and classifier outside shortcuts: what the name's depth counts."""
    row = PRESETS[name]
    table = layers(build(name), (row.image_size, row.image_size, 3))
    return sum(layer.kind != "BatchNorm" and "shortcut" not in layer.path for layer in table)


@pytest.mark.parametrize(
    ("name", "depth"),
    [("cifar_resnet20", 20), ("cifar_preact110", 110), ("resnet34", 34), ("resnet50", 50)],
)
def test_a_network_is_as_deep_as_its_name_says(name, depth):
    assert weight_layers(name) == depth


@pytest.mark.parametrize(
    ("name", "shortcut", "projections"),
    [
        ("cifar_resnet20", "none", 0),
        ("cifar_resnet20", "pad", 0),
        ("cifar_resnet20", "project", 2),
        ("cifar_resnet20", "project_all", 9),
        ("resnet18", "pad", 0),
        ("resnet18", "project", 3),
        ("resnet34", "project", 3),
        ("resnet34", "project_all", 16),
        ("resnet50", "project", 4),
        ("resnet50", "project_all", 16),
    ],
)
def test_options_project_only_where_the_paper_does(name, shortcut, projections):
    row = PRESETS[name]
    table = layers(build(name, shortcut=shortcut), (row.image_size, row.image_size, 3))
    on_shortcuts = [layer.kind for layer in table if "shortcut" in layer.path]
    assert on_shortcuts.count("Conv") == on_shortcuts.count("BatchNorm") == projections


def test_multiply_adds_of_a_group_are_those_of_its_own_channels():
    images = (6, 6, 8)
    whole, grouped = (nn.Conv(4, (3, 3), feature_group_count=g, use_bias=False) for g in (1, 4))
    assert count(whole, images) == (3 * 3 * 8 * 4, 6 * 6 * 3 * 3 * 8 * 4)
    assert count(grouped, images) == (3 * 3 * 2 * 4, 6 * 6 * 3 * 3 * 2 * 4)


def test_running_statistics_are_not_counted_as_parameters():
    norm = nn.BatchNorm(use_running_average=True)
    assert count(norm, (6, 6, 8)) == (16, 0)


def test_counting_computes_nothing(monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("counting compiles a program")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    model = build("cifar_resnet1202", width=4096)  # whose weights would fill a thousand machines
    assert count(model, CIFAR).parameters > 1e12

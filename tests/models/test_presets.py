"""The table of architectures against published counts; refusal of what no network can be."""

import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resjax.models import presets
from resjax.models.presets import PRESETS, architecture, branch_scale, stage_sizes
from resjax.models.resnet import build

# Parameters as torchvision and timm (the last five) count them, and as He et al.'s networks have
# them; multiply-adds in millions and billions as rounded where they are published.
PARAMETERS = {
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet1202": 19_421_274,
    "plain34": 21_623_848,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet50_v1": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "seresnet50": 28_088_024,
    "resnet50d": 25_576_264,
    "cifar_wrn28_10": 36_479_194,
}
MILLION_MACS = {"cifar_resnet20": 40.551, "cifar_resnet56": 125.486, "cifar_resnet110": 252.888}
BILLION_MACS = {
    "cifar_resnet1202": 2.829,
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet50_v1": 3.858,
    "resnet101": 7.801,
    "resnet152": 11.514,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_are_the_published_ones(name, parameters):
    assert PRESETS[name].parameters == parameters


def test_multiply_adds_are_the_published_ones():
    assert {name: round(PRESETS[name].macs / 1e6, 3) for name in MILLION_MACS} == MILLION_MACS
    assert {name: round(PRESETS[name].macs / 1e9, 3) for name in BILLION_MACS} == BILLION_MACS


@pytest.mark.parametrize("kind", ["plain", "resnet", "preact"])
def test_cifar_networks_of_basic_blocks_have_97216_n_minus_21926_parameters(kind):
    rows = [
        preset
        for name, preset in PRESETS.items()
        if re.fullmatch(rf"cifar_{kind}\d+", name)
        and "bottleneck" not in preset.fields.get("block", "basic")
    ]
    assert rows
    for row in rows:
        assert row.parameters == 97_216 * (row.fields["depth"] - 2) // 6 - 21_926


def test_a_plain_network_counts_as_its_residual_one_except_for_projections():
    for name, row in PRESETS.items():
        if name.startswith("cifar_plain"):
            twin = PRESETS[name.replace("plain", "resnet")]
            assert (row.parameters, row.macs) == (twin.parameters, twin.macs)
    projections = sum(2 * 64 * 64 * 4**k + 2 * 128 * 2**k for k in range(3))
    for depth in (18, 34):
        without, with_b = PRESETS[f"plain{depth}"], PRESETS[f"resnet{depth}"]
        assert with_b.parameters - without.parameters == projections


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_of_a_preset_gives_its_depth_and_kind(name):
    fields = architecture(name)
    depth = re.search(r"\d+", name)
    assert int(depth[0]) == fields["depth"]
    assert fields["shortcut"] == "none" or "plain" not in name


@pytest.mark.parametrize(
    ("family", "depth", "block", "blocks"),
    [
        ("cifar", 8, "basic", (1, 1, 1)),
        ("cifar", 110, "basic", (18, 18, 18)),
        ("cifar", 164, "bottleneck", (18, 18, 18)),
        ("cifar", 1001, "preact_bottleneck", (111, 111, 111)),
        ("wide", 28, "preact_basic", (4, 4, 4)),
        ("imagenet", 34, "basic", (3, 4, 6, 3)),
        ("imagenet", 50, "bottleneck", (3, 4, 6, 3)),
        ("imagenet", 152, "bottleneck", (3, 8, 36, 3)),
    ],
)
def test_depth_and_block_determine_the_blocks_per_stage(family, depth, block, blocks):
    assert stage_sizes(family, depth, block) == blocks


@given(
    st.integers(-10, 3000),
    st.sampled_from([("cifar", 2), ("wide", 4)]),
    st.sampled_from([("basic", 6), ("bottleneck", 9), ("preact_basic", 6)]),
)
def test_an_invalid_depth_is_an_error_that_names_the_nearest_valid_ones(depth, family, block):
    (family, offset), (block, period) = family, block
    try:
        blocks = stage_sizes(family, depth, block)
    except ValueError as error:
        named = [int(number) for number in re.findall(r"\d+", str(error).partition("nearest:")[2])]
        assert all(stage_sizes(family, near, block) for near in named)
        if depth < offset + period:
            assert named == [offset + period]
        else:
            below, above = named
            assert below < depth < above == below + period
    else:
        assert period * blocks[0] + offset == depth
        assert len(set(blocks)) == 1 <= blocks[0]


@given(st.integers(1, 300), st.sampled_from(["basic", "bottleneck"]))
def test_an_invalid_imagenet_depth_is_an_error_that_names_all_valid_ones(depth, block):
    valid = {"basic": "10, 18, 34", "bottleneck": "14, 26, 50, 101, 152, 200, 269"}[block]
    if str(depth) in valid.split(", "):
        assert len(stage_sizes("imagenet", depth, block)) == 4
    else:
        with pytest.raises(ValueError, match=f"valid: {valid}$"):
            stage_sizes("imagenet", depth, block)


def test_there_is_no_bottleneck_network_of_eighteen_layers():
    with pytest.raises(ValueError, match="18 is no ImageNet depth of 'bottleneck' blocks"):
        build({}, family="imagenet", depth=18, block="bottleneck")


def test_the_users_field_overrides_the_preset_which_overrides_the_family():
    assert architecture("cifar_plain56")["shortcut"] == "none"
    assert architecture("cifar_plain56", shortcut="pad")["shortcut"] == "pad"
    assert architecture("cifar_plain56", shortcut=None)["shortcut"] == "none"
    assert architecture("cifar_resnet56")["shortcut"] == "pad"
    assert architecture("resnet18")["shortcut"] == "project"


def test_options_stay_with_the_class_they_were_written_for():
    assert architecture("resnet50_v1")["block_options"] == {"stride_in_1x1": True}
    merged = architecture("resnet50_v1", block_options={"se_reduction": 16})["block_options"]
    assert merged == {"stride_in_1x1": True, "se_reduction": 16}
    basic = architecture("resnet50_v1", block="basic", depth=34)
    assert basic["block_options"] == {}


MISTAKES = {
    "unknown network": (
        {"name": "cifar_resnet57"},
        "unknown network 'cifar_resnet57'; did you mean 'cifar_resnet56'?",
    ),
    "misspelt family": ({"family": "cifer"}, "did you mean 'cifar'?"),
    "misspelt block": ({"block": "bottelneck"}, "did you mean 'bottleneck'?"),
    "misspelt shortcut": ({"shortcut": "projekt"}, "did you mean 'project'?"),
    "misspelt stem": ({"stem": "deeep"}, "did you mean 'deep'?"),
    "misspelt field": ({"depht": 20}, "unknown field 'depht'; did you mean 'depth'?"),
    "misspelt loop": ({"loop": "scam"}, "loop must be auto, unroll or scan, not 'scam'"),
    "no block": ({"block": "no_such_module:Block"}, "no module named 'no_such_module' here"),
    "no class": ({"block": "resjax.models.blocks:Blok"}, "has no attribute 'Blok'"),
    "misspelt option": (
        {"shortcut": "scale", "shortcut_options": {"faktor": 1.0}},
        "shortcut 'scale' has no option 'faktor'; it has: factor, branch_factor",
    ),
    "another's option": (
        {"block": "basic", "block_options": {"groups": 2}},
        "block 'basic' has no option 'groups'; it has: se_reduction",
    ),
    "a class's constant": (
        {"block_options": {"expansion": 2}},
        "block 'basic' has no option 'expansion'; it has: se_reduction",
    ),
    "bound field": (
        {"block_options": {"features": 3}},
        "block 'basic' has no option 'features'",
    ),
    "text for a number": (
        {"shortcut": "scale", "shortcut_options": {"factor": "1"}},
        "shortcut_options.factor must be float, not '1'",
    ),
    "fraction for a count": (
        {"block_options": {"se_reduction": 0.5}},
        "block_options.se_reduction must be int, not 0.5",
    ),
    "truth for a count": (
        {"block_options": {"se_reduction": True}},
        "block_options.se_reduction must be int, not True",
    ),
    "count for a truth": (
        {"depth": 11, "block": "bottleneck", "block_options": {"stride_in_1x1": 1}},
        "block_options.stride_in_1x1 must be bool, not 1",
    ),
    "depth as text": ({"depth": "20"}, "depth must be a whole number from 1 up, not '20'"),
    "depth as truth": ({"depth": True}, "depth must be a whole number from 1 up, not True"),
    "no width": ({"width": 0}, "width must be a whole number from 1 up, not 0"),
    "half a width": ({"widen": 1.5}, "widen must be a whole number from 1 up, not 1.5"),
    "depth": ({"depth": 21}, "depth 21 is not 6n + 2"),
    "preset's depth with another's block": (
        {"name": "cifar_resnet32", "block": "bottleneck"},
        "depth 32 is not 9n + 2 (cifar networks of 'bottleneck' blocks); nearest: 29 and 38",
    ),
    "a block without a last norm": (
        {"block": "preact_basic", "zero_init_residual": True},
        "zero_init_residual needs a block whose branch ends in a norm",
    ),
    "the scale of no norm": (
        {"norm": "none", "zero_init_residual": True},
        "zero_init_residual needs a norm, whose scale it sets; norm=none",
    ),
    "a plain network cut": (
        {"shortcut": "none", "stochastic_depth": 0.5},
        "stochastic_depth would cut a plain network in two",
    ),
    "a plain network cut by a scale": (
        {"shortcut": "none", "branch_scale": "learned"},
        "a branch_scale of 0 would cut a plain network in two",
    ),
    "a scale per stage": (
        {"branch_scale": (1, 0.5, 0)},
        "branch_scale has 3 numbers; the network has 9 blocks",
    ),
    "every image dropped": (
        {"stochastic_depth": 1.0},
        "stochastic_depth must be at least 0 and less than 1, not 1.0",
    ),
}


@pytest.mark.parametrize(("fields", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        build({**fields})
    assert "\n" not in str(refused.value)


def test_an_integer_is_a_valid_float_option():
    options = {"factor": 1}
    assert architecture(shortcut="scale", shortcut_options=options)["shortcut_options"] == options


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet49", "did you mean 'resnet50'?"),
        ("resnet1000", "did you mean 'resnet152'?"),
        ("resnet5", "did you mean 'resnet50'?"),
        ("resnet51_v1", "did you mean 'resnet50_v1'?"),
        ("ResNet34", "did you mean 'resnet34'?"),
        (
            "cifar_resnet49",
            "'cifar_resnet44'? For another depth, set its field depth; nearest: 44 and 50",
        ),
        (
            "cifar_wrn29_10",
            "'cifar_wrn28_10'? For another depth, set its field depth; nearest: 28 and 34",
        ),
        ("cifar_plain50", "nearest: 50"),
        ("vgg16", "`resjax models` lists all networks"),
    ],
)
def test_an_unknown_network_is_answered_with_the_nearest_depth_of_its_kind(name, hint):
    with pytest.raises(ValueError, match=re.escape(hint) + "$"):
        architecture(name)


def test_a_name_that_resembles_none_is_answered_with_the_whole_list():
    with pytest.raises(ValueError, match="known: cifar, wide, imagenet"):
        architecture(family="zzz")


def test_a_mistake_is_refused_before_jax_is_imported():
    program = (
        "import sys; from resjax.models.presets import architecture\n"
        "try: architecture('cifar_resnet57')\n"
        "except ValueError: assert not {'jax', 'flax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_users_classes_are_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "own_shortcut.py").write_text("class Detour: ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert presets.find("shortcut", "own_shortcut:Detour").__name__ == "Detour"


SCALES = {
    0.5: 0.5,
    "L^-0.5": 0.5,
    "L^0": 1,
    "1/L": 0.25,
    (1, 0.5, 0, -1): None,
    "learned": 0,
    "learned:0.25": 0.25,
    "learned:L^-1": 0.25,
}


@pytest.mark.parametrize(("value", "factor"), SCALES.items())
def test_a_branch_scale_stands_for_a_factor_per_block(value, factor):
    factors, learned = branch_scale(value, 4)
    assert factors == (value if factor is None else (factor,) * 4)
    assert learned == str(value).startswith("learned")


@pytest.mark.parametrize(
    "value",
    ["l^-1", "L^", "L^x", "L^1e9", "learned:", "learned:x", "learn", True, math.nan, (1, None)],
)
def test_an_invalid_branch_scale_is_named_with_what_is_valid(value):
    with pytest.raises(ValueError, match="is not valid; give a number, a power") as refused:
        branch_scale(value, 2)
    assert repr(value) in str(refused.value)


def test_a_scale_is_the_same_network_as_an_integer():
    for one in (1, 1.0):
        assert repr(architecture(branch_scale=one)["branch_scale"]) == "1.0"
    assert repr(architecture(depth=8, branch_scale=[1, 0, 1])["branch_scale"]) == "(1.0, 0.0, 1.0)"

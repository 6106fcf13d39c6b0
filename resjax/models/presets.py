"""The published architectures as data, and the rules that turn a row of data into a network.

Imports no JAX, so that a misspelt name or an impossible depth is refused before anything heavy
loads. Sources: [H15] He et al. 2015, arXiv 1512.03385; [H16] He et al. 2016, arXiv 1603.05027;
[Z16] Zagoruyko & Komodakis 2016, arXiv 1605.07146; [X17] Xie et al. 2017, arXiv 1611.05431;
[Hu18] Hu et al. 2018, arXiv 1709.01507; [He19] He et al. 2019, arXiv 1812.01187; [K20] Kolesnikov
et al. 2020, arXiv 1912.11370.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from resjax.errors import UserError
from resjax.user_code import import_name


class ImpossibleNetworkError(UserError, ValueError):
    """Fields that describe no network, found while the network is traced; one line."""


class ImpossibleDepthError(ValueError):
    """No network of this family has this depth with these blocks; one line."""

    def __init__(self, message: str, depth: int, family: str):
        super().__init__(message)
        self.depth, self.family = depth, family


BLOCKS = {
    "basic": "resjax.models.blocks:BasicBlock",
    "bottleneck": "resjax.models.blocks:BottleneckBlock",
    "bn_after_addition_basic": "resjax.models.blocks:BNAfterAdditionBasicBlock",
    "bn_after_addition_bottleneck": "resjax.models.blocks:BNAfterAdditionBottleneckBlock",
    "relu_before_addition_basic": "resjax.models.blocks:ReLUBeforeAdditionBasicBlock",
    "relu_before_addition_bottleneck": "resjax.models.blocks:ReLUBeforeAdditionBottleneckBlock",
    "relu_preact_basic": "resjax.models.blocks:ReLUPreActBasicBlock",
    "relu_preact_bottleneck": "resjax.models.blocks:ReLUPreActBottleneckBlock",
    "preact_basic": "resjax.models.blocks:PreActBasicBlock",
    "preact_bottleneck": "resjax.models.blocks:PreActBottleneckBlock",
    "fixup_basic": "resjax.models.blocks:FixupBasicBlock",
    "fixup_bottleneck": "resjax.models.blocks:FixupBottleneckBlock",
}
BLOCK_LAYERS = {name: 3 if "bottleneck" in name else 2 for name in BLOCKS}
BLOCK_FIELDS = {"fixup_basic": {"norm": "fixup"}, "fixup_bottleneck": {"norm": "fixup"}}
"""Defaults for other fields of a network with these blocks."""

SHORTCUTS = {
    "none": "resjax.models.shortcuts:NoShortcut",
    "pad": "resjax.models.shortcuts:Pad",
    "project": "resjax.models.shortcuts:Project",
    "project_all": "resjax.models.shortcuts:ProjectAll",
    "project_avg": "resjax.models.shortcuts:ProjectAverage",
    "scale": "resjax.models.shortcuts:Scale",
    "exclusive_gate": "resjax.models.shortcuts:ExclusiveGate",
    "shortcut_gate": "resjax.models.shortcuts:ShortcutGate",
    "conv": "resjax.models.shortcuts:Convolve",
    "dropout": "resjax.models.shortcuts:DropShortcut",
}

# What has a name, and the fields that the network binds; other fields of a class are its options.
NAMES = {"block": BLOCKS, "shortcut": SHORTCUTS}
BOUND = {
    "block": ("features", "strides", "conv", "norm", "act", "shortcut"),
    "shortcut": ("features", "strides", "conv", "norm"),
}

STEMS = ("cifar", "imagenet", "deep", "bit")
STEM_POOLS = ("max", "average", "blur", "none")
NORMS = ("batch", "group", "none", "fixup")
NORM = {"norm": "batch", "standardize": False}
CLASSES = {"cifar": 10, "wide": 10, "imagenet": 1000}  # of the data set that a family is for

# Defaults for the fields that neither a preset nor the user sets.
FAMILIES: dict[str, dict[str, Any]] = {
    "cifar": dict(depth=20, block="basic", shortcut="pad", width=16, widen=1, stem="cifar", **NORM),
    "wide": dict(depth=28, block="preact_basic", shortcut="project", width=16, widen=10, stem="cifar", **NORM),
    "imagenet": dict(depth=50, block="bottleneck", shortcut="project", width=64, widen=1, stem="imagenet", **NORM),
}  # fmt: skip

# Blocks per stage of the ImageNet networks, by weight layers per block and depth [H15 table 1, H16];
# 10, 14, 26 and 269 are common in collections of pretrained weights.
IMAGENET_STAGES = {
    2: {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)},
    3: {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3), 269: (3, 30, 48, 8)},
}  # fmt: skip
# CIFAR depths are 3 * layers * n + offset. The offset counts the first convolution and the classifier;
# in wide networks it counts the three projections but not the classifier [Z16].
CIFAR_OFFSETS = {"cifar": 2, "wide": 4}


class Preset(NamedTuple):
    """A published architecture, with the counts of its traced program.

    `parameters` includes BN scales and biases but not running statistics; `macs` are the
    multiply-adds of convolutions and classifier for one image of `image_size`² pixels, 3 channels.
    """

    fields: Mapping[str, Any]
    parameters: int
    macs: int
    source: str

    @property
    def image_size(self) -> int:
        return 224 if self.fields["family"] == "imagenet" else 32


def _fields(family: str, depth: int, **fields: Any) -> dict[str, Any]:
    return {"family": family, "depth": depth, **fields}


_cifar, _wide = partial(_fields, "cifar"), partial(_fields, "wide")
_imagenet = partial(_fields, "imagenet", block="bottleneck")
_bit = partial(
    _imagenet,
    block="preact_bottleneck",
    block_options={"stride_in_1x1": False},
    stem="bit",
    norm="group",
    standardize=True,
)
V1 = {"stride_in_1x1": True}  # bottlenecks as in [H15]; without this option they are v1.5
CIFAR_COUNTS = {  # parameters and multiply-adds by depth: option A has no parameters
    8: (75_290, 12_239_488),
    14: (172_506, 26_395_264),
    20: (269_722, 40_551_040),
    32: (464_154, 68_862_592),
    44: (658_586, 97_174_144),
    56: (853_018, 125_485_696),
    110: (1_727_962, 252_887_680),
}

# fmt: off
PRESETS: dict[str, Preset] = {
    **{f"cifar_plain{depth}": Preset(_cifar(depth, shortcut="none"), *counts, "H15") for depth, counts in CIFAR_COUNTS.items()},
    **{f"cifar_resnet{depth}": Preset(_cifar(depth), *counts, "H15") for depth, counts in CIFAR_COUNTS.items()},
    "cifar_resnet1202": Preset(_cifar(1202), 19_421_274, 2_829_238_912, "H15"),
    "cifar_resnet164": Preset(_cifar(164, block="bottleneck", shortcut="project"), 1_704_154, 247_646_720, "H16"),
    "cifar_preact110": Preset(_cifar(110, block="preact_basic"), 1_727_962, 252_887_680, "H16"),
    "cifar_preact164": Preset(_cifar(164, block="preact_bottleneck", shortcut="project"), 1_703_258, 244_500_992, "H16"),
    "cifar_preact1001": Preset(_cifar(1001, block="preact_bottleneck", shortcut="project"), 10_327_706, 1_487_849_984, "H16"),
    "cifar_wrn16_8": Preset(_wide(16, widen=8), 10_961_370, 1_548_145_664, "Z16"),
    "cifar_wrn28_10": Preset(_wide(28, widen=10), 36_479_194, 5_243_328_768, "Z16"),
    "cifar_wrn40_4": Preset(_wide(40, widen=4), 8_949_210, 1_298_582_016, "Z16"),
    "plain18": Preset(_imagenet(18, block="basic", shortcut="none"), 11_515_688, 1_794_805_760, "H15"),
    "plain34": Preset(_imagenet(34, block="basic", shortcut="none"), 21_623_848, 3_644_493_824, "H15"),
    "resnet18": Preset(_imagenet(18, block="basic"), 11_689_512, 1_814_073_344, "H15"),
    "resnet34": Preset(_imagenet(34, block="basic"), 21_797_672, 3_663_761_408, "H15"),
    "resnet50": Preset(_imagenet(50), 25_557_032, 4_089_184_256, "H15"),
    "resnet101": Preset(_imagenet(101), 44_549_160, 7_801_405_440, "H15"),
    "resnet152": Preset(_imagenet(152), 60_192_808, 11_513_626_624, "H15"),
    "resnet50_v1": Preset(_imagenet(50, block_options=V1), 25_557_032, 3_857_973_248, "H15"),
    "resnet101_v1": Preset(_imagenet(101, block_options=V1), 44_549_160, 7_570_194_432, "H15"),
    "resnet152_v1": Preset(_imagenet(152, block_options=V1), 60_192_808, 11_282_415_616, "H15"),
    "resnext50_32x4d": Preset(_imagenet(50, block_options=dict(groups=32, group_width=4)), 25_028_904, 4_230_479_872, "X17"),
    "resnext101_32x8d": Preset(_imagenet(101, block_options=dict(groups=32, group_width=8)), 88_791_336, 16_414_015_488, "X17"),
    "wide_resnet50_2": Preset(_imagenet(50, block_options=dict(group_width=128)), 68_883_240, 11_398_021_120, "Z16"),
    "seresnet50": Preset(_imagenet(50, block_options=dict(se_reduction=16)), 28_088_024, 4_091_699_200, "Hu18"),
    "resnet50d": Preset(_imagenet(50, stem="deep", shortcut="project_avg"), 25_576_264, 4_328_824_832, "He19"),
    "bit_r50x1": Preset(_bit(50), 25_549_352, 4_089_184_256, "K20"),
    "bit_r101x1": Preset(_bit(101), 44_541_480, 7_801_405_440, "K20"),
    "bit_r50x3": Preset(_bit(50, width=192), 217_319_080, 36_082_286_592, "K20"),
}
# fmt: on

# The fields that define the network; the other fields of a config's model say how it computes.
ARCHITECTURE = (
    "name", "family", "depth", "block", "block_options", "shortcut", "shortcut_options", "width",
    "widen", "stem", "stem_pool", "dilated_stages", "norm", "standardize", "zero_init_residual", "stochastic_depth",
    "branch_scale",
)  # fmt: skip


def architecture(name: str | None = None, **fields: Any) -> dict[str, Any]:
    """Completes the fields of a network: the user's, then the preset's, then the family's.

    Args:
      name: a key of `PRESETS`, or None.
      **fields: those of `ARCHITECTURE`; None means unset. `width` is that of the first stage,
        `widen` a factor on every stage's width. Options of the preset and the user are merged.

    Returns:
      All fields without `name`.

    Raises:
      ValueError: a name is unknown or the combination impossible; one line, with the nearest valid
        choice.
    """
    if name is not None and name not in PRESETS:
        raise ValueError(f"unknown network {name!r}{nearest_network(str(name))}")
    chosen = {key: value for key, value in fields.items() if value is not None}
    preset = dict(PRESETS[name].fields) if name else {}
    family = chosen.get("family", preset.get("family", "cifar"))
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}{nearest(family, FAMILIES)}")
    filled = {"family": family, **FAMILIES[family], **preset, **chosen}
    filled |= {**BLOCK_FIELDS.get(filled["block"], {}), **chosen}
    for kind in ("block", "shortcut"):
        # A preset's options belong to its class; another class does not inherit them.
        same = filled[kind] == preset.get(kind, filled[kind])
        inherited = preset.get(f"{kind}_options", {}) if same else {}
        filled[f"{kind}_options"] = {**inherited, **chosen.get(f"{kind}_options", {})}
    filled.setdefault("stem_pool", "none" if filled["stem"] == "cifar" else "max")
    filled.setdefault("dilated_stages", 0)
    filled.setdefault("branch_scale", 1.0)
    _check(filled)
    if not isinstance(filled["branch_scale"], str):  # 1 and 1.0 are the same network
        scale = filled["branch_scale"]
        several = isinstance(scale, (tuple, list))
        filled["branch_scale"] = tuple(map(float, scale)) if several else float(scale)
    return filled


def stage_sizes(family: str, depth: int, block: str) -> tuple[int, ...]:
    """Returns the number of blocks in each stage.

    Raises:
      ValueError: no network has this depth; the message names the nearest valid ones.
    """
    layers = block_layers(block)
    if family in CIFAR_OFFSETS:
        offset, period = CIFAR_OFFSETS[family], 3 * layers
        n, remainder = divmod(depth - offset, period)
        if remainder or n < 1:
            message = f"depth {depth} is not {period}n + {offset} ({family} networks of {block!r} "
            near = nearest_depths(depth, [layers], family)
            raise ImpossibleDepthError(f"{message}blocks); nearest: {near}", depth, family)
        return (n,) * 3
    depths = IMAGENET_STAGES.get(layers, {})
    if depth not in depths:
        valid = ", ".join(map(str, depths)) or "none"
        raise ValueError(f"depth {depth} is no ImageNet depth of {block!r} blocks; valid: {valid}")
    return depths[depth]


def nearest_depths(depth: int, layers: Iterable[int], family: str = "cifar") -> str:
    """Returns the nearest CIFAR depths, as text, that suit blocks of each of these `layers`."""
    offset, period = CIFAR_OFFSETS[family], 3 * math.lcm(*layers)
    n = max((depth - offset) // period, 1)
    below, above = (offset + period * each for each in (n, n + 1))
    return f"{below} and {above}" if depth > below else f"{below}"


def stem_stride(stem: str, pool: str) -> int:
    """Returns the stride of a stem with its pooling."""
    return (1 if stem == "cifar" else 2) * (1 if pool == "none" else 2)


def stages_to_dilate(fields: Mapping[str, Any], output_stride: int) -> int:
    """Returns the number of dilated stages with which the last stage has a stride.

    Args:
      fields: of a network, complete.
      output_stride: of the last stage's features.

    Raises:
      ValueError: no number of stages gives this stride.
    """
    stages = len(stage_sizes(fields["family"], fields["depth"], fields["block"]))
    first = stem_stride(fields["stem"], fields["stem_pool"])
    strides = [first * 2**stage for stage in range(stages)]
    if output_stride not in strides:
        known = ", ".join(map(str, strides))
        raise ValueError(f"output_stride must be one of {known}, not {output_stride!r}")
    dilated = stages - 1 - strides.index(output_stride)
    _check({**fields, "dilated_stages": dilated})
    return dilated


class BranchScale(NamedTuple):
    """Factors of the branches, one per block, or the values with which learned ones start."""

    factors: tuple[float, ...]
    learned: bool


def branch_scale(value: Any, blocks: int) -> BranchScale:
    """Returns the factor of the branch of each block.

    Args:
      value: a number; a power of the number of blocks, `L^-0.5` or `1/L`; a tuple with one number
        per block; or `learned`, a parameter per block that starts at 0, or at a number or power as
        in `learned:0.2`.
      blocks: of the network, in all stages.

    Raises:
      ValueError: `value` is none of these.
    """
    learned = isinstance(value, str) and value.partition(":")[0] == "learned"
    start = value
    if learned:
        start = 0.0 if value == "learned" else value.removeprefix("learned:")
    each = start if isinstance(start, (tuple, list)) else (start,) * blocks
    if len(each) != blocks:
        raise ValueError(f"branch_scale has {len(each)} numbers; the network has {blocks} blocks")
    try:
        return BranchScale(tuple(_factor(factor, blocks) for factor in each), learned)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"branch_scale={value!r} is not valid; give a number, a power of the number of blocks "
            "such as L^-0.5 or 1/L, one number per block, learned, or learned:START"
        ) from None


def _factor(value: Any, blocks: int) -> float:
    if isinstance(value, str) and (match := re.fullmatch(r"1/L|L\^(.+)", value)):
        value = float(blocks) ** float(match[1] or -1)
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def block_layers(block: str) -> int:
    """Returns the weight layers on a block's branch, from the table or the class's `layers`."""
    if block in BLOCK_LAYERS:
        return BLOCK_LAYERS[block]
    return getattr(find("block", block), "layers", 2)


def find(kind: str, name: str) -> Any:
    """Returns the class of a block or shortcut: one of ours, or a user's `package.module:Class`.

    Args:
      kind: "block" or "shortcut".
      name: in the table `NAMES[kind]`, or of the user's class.

    Raises:
      ValueError: the class does not exist; the message names the nearest name.
    """
    path = NAMES[kind].get(name, name)
    if ":" not in str(path):
        hint = f"{nearest(name, NAMES[kind])} (or package.module:Class of your own)"
        raise ValueError(f"unknown {kind} {name!r}{hint}")
    try:
        return import_name(path)
    except ImportError as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error


def nearest(word: object, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?`, or lists a dozen choices or fewer if none resembles the word."""
    known = list(choices)
    if close := difflib.get_close_matches(str(word), known, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 12 else ""


def nearest_network(name: str) -> str:
    """Returns a hint at a network of `PRESETS`, if possible of the same kind and nearest depth.

    If networks of that kind exist in every valid depth, the hint names the nearest of these too.
    """
    begin = [known for known in PRESETS if known.startswith(name)]
    kind, depth, end = _kind_depth_end(name)
    same = [known for known in PRESETS if _kind_depth_end(known)[::2] == [kind, end]]
    if begin or not depth or not same:
        return nearest(name, begin or PRESETS) or "; `resjax models` lists all networks"
    preset = min(same, key=lambda known: abs(PRESETS[known].fields["depth"] - int(depth)))
    hint = f"; did you mean {preset!r}?"
    fields = {**FAMILIES[PRESETS[preset].fields["family"]], **PRESETS[preset].fields}
    if fields["family"] in CIFAR_OFFSETS:
        near = nearest_depths(int(depth), [block_layers(fields["block"])], fields["family"])
        hint += f" For another depth, set its field depth; nearest: {near}"
    return hint


def _kind_depth_end(name: str) -> list[str]:
    """Splits `cifar_wrn28_10` into `cifar_wrn`, `28` and `_10`."""
    return [*re.split(r"(\d+)", name, maxsplit=1), "", ""][:3]


def _check(fields: Mapping[str, Any]) -> None:
    """Refuses impossible fields with a ValueError of one line."""
    block, shortcut = fields["block"], fields["shortcut"]
    for kind, known in NAMES.items():
        name, options = fields[kind], fields[f"{kind}_options"]
        if options or name not in known:  # a class of ours is imported, with JAX, only if needed
            _check_class(kind, name, find(kind, name), options)
    for key in ("depth", "width", "widen"):
        value = fields[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a whole number from 1 up, not {value!r}")
    stages = len(stage_sizes(fields["family"], fields["depth"], block))
    if not 0 <= (number := fields["dilated_stages"]) < stages:
        raise ValueError(f"dilated_stages must be from 0 to {stages - 1}, not {number!r}")
    if number and fields["block_options"].get("antialias", "none") != "none":
        raise ValueError("dilated_stages does not go with antialias, which strides after a filter")
    for key, choices in (("stem", STEMS), ("stem_pool", STEM_POOLS), ("norm", NORMS)):
        if fields[key] not in choices:
            raise ValueError(f"unknown {key} {fields[key]!r}{nearest(fields[key], choices)}")
    if not isinstance(fields["standardize"], bool):
        raise ValueError(f"standardize must be true or false, not {fields['standardize']!r}")
    if fields.get("zero_init_residual"):
        cls, norm = find("block", block), fields["norm"]
        if getattr(cls, "preactivation", False) or not getattr(cls, "ends_in_norm", True):
            raise ValueError(
                f"zero_init_residual needs a block whose branch ends in a norm; that of {block!r} "
                "does not"
            )
        if norm not in ("batch", "group"):
            raise ValueError(f"zero_init_residual needs a norm, whose scale it sets; norm={norm}")
    blocks = sum(stage_sizes(fields["family"], fields["depth"], block))
    factors = branch_scale(fields["branch_scale"], blocks).factors
    if shortcut == "none" and 0 in factors:
        raise ValueError(
            "a branch_scale of 0 would cut a plain network in two; it needs a shortcut"
        )
    if not 0 <= (rate := fields.get("stochastic_depth") or 0.0) < 1:
        raise ValueError(f"stochastic_depth must be at least 0 and less than 1, not {rate!r}")
    if rate and shortcut == "none":
        raise ValueError("stochastic_depth would cut a plain network in two; it needs a shortcut")


def _check_class(kind: str, name: str, cls: Any, options: Mapping[str, Any]) -> None:
    declared = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    fields = {field.name: field for field in declared}
    if lacking := [field for field in BOUND[kind] if field not in fields]:
        parent = f"resjax.models.{kind}s.{kind.capitalize()}"
        raise ValueError(
            f"{kind} {name!r} lacks the fields {', '.join(lacking)}; derive it from {parent}"
        )
    open_fields = [
        key
        for key in fields
        if key not in {*BOUND[kind], "share", "network_blocks", "name", "parent"}
    ]
    for key, value in options.items():
        if key not in open_fields:
            known = ", ".join(open_fields) or "none"
            raise ValueError(f"{kind} {name!r} has no option {key!r}; it has: {known}")
        expected = type(fields[key].default)
        fits = isinstance(value, expected) or (expected is float and isinstance(value, int))
        if isinstance(value, bool) != (expected is bool) or not fits:
            raise ValueError(f"{kind}_options.{key} must be {expected.__name__}, not {value!r}")

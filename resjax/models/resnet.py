"""Residual networks: stem, stages of blocks, head.

The network binds `conv`, `norm`, `act` and `shortcut` once and hands them to its blocks (the idea
of google/flax `examples/imagenet` and n2cholas/jax-resnet). A stage is one block that may change
the shape, then equal blocks, so the equal ones can be scanned over: compile time then does not
depend on depth. Scanned and unrolled are the same network; `layout` converts the variables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import LazyRng
from jaxtyping import Array, Float

from resjax.models import heads, layout, presets, shortcuts
from resjax.models.activation import relu
from resjax.models.blocks import blur
from resjax.models.convolution import conv as convolution
from resjax.models.normalization import BatchNorm, Bias, GroupNorm
from resjax.xla.pooling import max_pool

Images = Float[Array, "n h w c"]

BN_FIELDS = ("bn_momentum", "bn_epsilon", "bn_unbiased")


class ResNet(nn.Module):
    """A residual network; with a shortcut that carries nothing, a plain one.

    Attributes:
      stages: the number of blocks in each stage.
      block: a block class, or a partial of one (see `resjax.models.blocks.Block`).
      shortcut: a shortcut class, or a partial of one (see `resjax.models.shortcuts`).
      head: a module that maps the features of all stages to the outputs (see
        `resjax.models.heads`); None returns the features themselves.
      width: features of the first stage; each further stage doubles them.
      stem: "cifar" (3x3 convolution), "imagenet" (7x7 with stride 2, max-pooling), "deep" (three
        3x3 in place of the 7x7: ResNet-D) or "bit" ("imagenet" with zeros around the pooled image).
      stem_width: output channels of the stem.
      stem_pool: what ends the stem: "max" (3x3 with stride 2), "average" (2x2), "blur" (maximum of
        3x3, then a blur) or "none".
      dilated_stages: how many of the last stages dilate their 3x3 convolutions instead of
        striding, as segmentation networks do (torchvision's `replace_stride_with_dilation`). Every
        second row and column of a stage's output is then that of the network with strides.
      loop: "unroll" or "scan" the equal blocks of a stage, or "auto": see `uses_scan`.
      dtype: of the computation; parameters and BN statistics stay float32.
      norm: "batch", "group"; "none", which puts a bias per channel in the place of every norm, or
        "fixup", with one number for all channels, one more after the last stage, and a classifier
        that starts at zero (Zhang et al. 2019).
      standardize: normalize each filter of a convolution to mean 0 and variance 1.
      zero_init_residual: start each block as its shortcut; its branch must end in a norm.
      stochastic_depth: rate at which the last block is dropped in training; block l of L is dropped
        at l / L of it (Huang et al. 2016). Needs a `dropout` key in `apply`, as dropout does.
      branch_scale: factor of every block's branch (see `presets.branch_scale`), or an array with
        one number per block, which may be traced. A learned factor is the parameter
        `branch_scale/scale` of its block.
      bn_momentum, bn_epsilon: a momentum of 0.9 here is 0.1 in PyTorch.
      bn_unbiased: whether running variances are unbiased, as in PyTorch, or biased, as in Flax.
      norm_options: further options of `BatchNorm`, such as which images share their statistics.
      remat: store only the outputs of convolutions for the backward pass and recompute the rest; a
        basic block then stores half of the bytes.
    """

    stages: Sequence[int]
    block: Any
    shortcut: Any
    head: Any = None
    width: int = 16
    stem: str = "cifar"
    stem_width: int = 16
    stem_pool: str = "none"
    dilated_stages: int = 0
    loop: str = "auto"
    dtype: Any = jnp.float32
    norm: str = "batch"
    standardize: bool = False
    zero_init_residual: bool = False
    stochastic_depth: float = 0.0
    branch_scale: Any = 1.0
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    bn_unbiased: bool = False
    norm_options: Mapping[str, Any] | None = None
    remat: bool = False

    @property
    def feature_strides(self) -> dict[str, int]:
        """The stride of each entry of `features`: pixels of the image per pixel of the features."""
        strides = {"stem": presets.stem_stride(self.stem, self.stem_pool)}
        for index in range(len(self.stages)):
            strided = 0 < index < len(self.stages) - self.dilated_stages
            strides[f"stage{index + 1}"] = [*strides.values()][-1] * (2 if strided else 1)
        return strides

    @property
    def feature_channels(self) -> dict[str, int]:
        """The number of channels of each entry of `features`."""
        first = self.width * getattr(class_of(self.block), "expansion", 1)
        stages = {f"stage{index + 1}": first * 2**index for index in range(len(self.stages))}
        return {"stem": self.stem_width} | stages

    @nn.nowrap
    def init_with_output(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Draws variables as Flax does, for both layouts through the scan.

        So both layouts get the same parameters to the bit, and unrolled networks compile this
        program several times faster. `init` calls this method.
        """
        if uses_scan(self.loop, self.stages):
            return super().init_with_output(*arguments, **options)
        outputs, variables = self.clone(loop="scan").init_with_output(*arguments, **options)
        return outputs, layout.unrolled(variables)

    def __call__(self, images: Images, train: bool = False) -> Any:
        """Returns the outputs of the head: for classification, logits (n, classes) in float32."""
        return self.forward(images, train, with_head=True)

    def features(self, images: Images, train: bool = False) -> heads.Features:
        """Returns the outputs of the stem and each stage: {"stem": ..., "stage1": ..., ...}.

        The variables need no parameters of the head.
        """
        return self.forward(images, train, with_head=False)

    @nn.compact
    def forward(self, images: Images, train: bool, with_head: bool) -> Any:
        conv = partial(convolution, dtype=self.dtype, standardize=self.standardize)
        batch_norm = partial(
            BatchNorm,
            **(self.norm_options or {}),
            use_running_average=not train,
            momentum=self.bn_momentum,
            unbiased=self.bn_unbiased,
        )
        fixup = partial(Bias, scalar=True)
        kinds = {"batch": batch_norm, "group": GroupNorm, "none": Bias, "fixup": fixup}
        norm = partial(
            make_norm,
            kind=kinds[self.norm],
            zero_last=self.zero_init_residual,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
        )
        act = relu
        cls, depth = class_of(self.block), sum(self.stages)
        preactivation = getattr(cls, "preactivation", False)
        # A projection of activated images is not normalized [H16, the authors' code].
        shortcut_norm = identity_norm if preactivation else norm
        shortcut = partial(self.shortcut, conv=conv, norm=shortcut_norm, name="shortcut")
        block = partial(self.block, conv=conv, norm=norm, act=act, shortcut=shortcut)
        if hasattr(cls, "network_blocks"):
            block = partial(block, network_blocks=depth)
        first = partial(block, share=True) if preactivation and hasattr(cls, "share") else block
        scan = uses_scan(self.loop, self.stages)
        if self.remat:
            first, block = rematerialize(first, scan), rematerialize(block, scan)
        branches = scaled_branches(self.branch_scale, depth)
        if self.stochastic_depth and train and self.has_rng("dropout"):
            rates = self.stochastic_depth * jnp.arange(1, depth + 1) / depth
            branches = replace(branches, drop_rates=rates)

        stem = Stem(
            self.stem, self.stem_width, self.stem_pool, conv, norm, act, preactivation, name="stem"
        )
        x = stem(jnp.asarray(images, self.dtype))
        outputs = {"stem": x}
        dilation, undilated = 1, len(self.stages) - self.dilated_stages
        for index, blocks in enumerate(self.stages):
            done = sum(self.stages[:index])
            opening, dilates = first if index == 0 else block, index >= undilated
            if dilates:
                opening = without_strides(opening, dilation)
                dilation *= 2
            x = Stage(
                features=self.width * 2**index,
                strides=1 if index == 0 else 2,
                first=opening,
                block=dilated(block, dilation),
                blocks=blocks,
                branches=branches[done : done + blocks],
                scan=scan,
                dilates=dilates,
                name=f"stage{index + 1}",
            )(x)
            outputs[f"stage{index + 1}"] = x
        last = f"stage{len(self.stages)}"
        if preactivation:  # the last addition is not activated yet [H16 appendix]
            outputs[last] = act(norm(name="norm")(x))
        elif getattr(cls, "activate_last", False):
            outputs[last] = act(x)
        elif self.norm == "fixup":  # the bias before the classifier
            outputs[last] = norm(name="norm")(x)
        if with_head and self.head is not None:
            changed = {"kernel_init": nn.initializers.zeros} if self.norm == "fixup" else {}
            return heads.bind(self.head, changed, conv=conv, norm=norm, act=act)(outputs)
        return outputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branches:
    """Drop rates and scale factors of the branches, one number per block each.

    Attributes:
      drop_rates: of stochastic depth; None never drops.
      scales: factors, or the values with which learned factors start; None means 1.
      learned: whether the factors are parameters.
    """

    drop_rates: Any = None
    scales: Any = None
    learned: bool = field(default=False, metadata={"static": True})

    def __getitem__(self, index: int | slice) -> "Branches":
        """Returns the branch of one block, or the branches of a slice of blocks."""
        return jax.tree.map(lambda values: values[index], self)

    def bind(self, block: Any) -> Any:
        """Binds a shortcut that drops and scales the branch to a block."""
        if self.drop_rates is None and self.scales is None:
            return block
        bound = block.keywords["shortcut"]
        factors: list[Callable[[], Any]] = []
        if self.learned:
            factors.append(partial(shortcuts.LearnedScale, self.scales, name="branch_scale"))
        elif self.scales is not None:
            factors.append(lambda: lambda x: jnp.asarray(self.scales, x.dtype))
        if self.drop_rates is not None:
            factors.append(partial(shortcuts.Survival, self.drop_rates, name="survival"))

        def shortcut(features: int, strides: int) -> Callable[[Images], Any]:
            added, modules = bound(features, strides), [factor() for factor in factors]

            def apply(x: Images) -> Any:
                values = (module(x) for module in modules)
                return reduce(shortcuts.scale_branch, values, added(x))

            return apply

        return partial(block, shortcut=shortcut)


class Stem(nn.Module):
    """The layers before the first stage."""

    kind: str
    features: int
    pool: str
    conv: Any
    norm: Any
    act: Any
    preactivation: bool  # leave the last norm and activation to the first block

    @nn.compact
    def __call__(self, x: Images) -> Images:
        if self.kind == "deep":
            x = self.act(self.norm()(self.conv(self.features // 2, 3, 2)(x)))
            x = self.act(self.norm()(self.conv(self.features // 2, 3)(x)))
            x = self.conv(self.features, 3)(x)
        elif self.kind == "cifar":
            x = self.conv(self.features, 3)(x)
        else:
            x = self.conv(self.features, 7, 2)(x)
        if not self.preactivation:
            x = self.act(self.norm()(x))
        if self.kind == "bit":  # BiT pads with zeros, which exceed negative pixels in a maximum
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        if self.pool == "average":
            return nn.avg_pool(x, (2, 2), (2, 2))
        if self.pool != "none":
            border, strides = (0 if self.kind == "bit" else 1), (1 if self.pool == "blur" else 2)
            x = max_pool(x, 3, strides, border)
        return blur(x) if self.pool == "blur" else x


class Stage(nn.Module):
    """Blocks of equal width: `block1`, which may change the shape, then equal ones.

    Unrolled, the equal ones are `block2`, `block3`, ...; scanned, `blocks`, stacked along axis 0.
    """

    features: int
    strides: int
    first: Any
    block: Any
    blocks: int
    branches: Branches  # of these blocks
    scan: bool
    dilates: bool = False  # in place of the strides

    @nn.compact
    def __call__(self, x: Images) -> Images:
        equal = self.blocks - 1
        first, before = self.branches[0].bind(self.first), x.shape
        x = first(self.features, self.strides, name="block1")(x)
        if self.dilates and x.shape[1:3] != before[1:3]:
            raise presets.ImpossibleNetworkError(
                f"{'/'.join(self.path)}: dilated_stages needs a block whose strides are those of "
                f"its convolutions, and {class_of(self.first).__name__} strides by itself"
            )
        if equal and self.scan:
            stacked = self.block(self.features, 1, name="blocks")

            def step(stacked: Any, x: Images, branch: Branches) -> tuple[Images, None]:
                # The rate is known only inside the loop, so the block is bound to it here.
                block = branch.bind(self.block)
                return block(self.features, 1, parent=stacked.scope)(x), None

            scanned = nn.scan(
                step,
                variable_axes={True: 0},  # any collection, of a block or of a diagnostic
                split_rngs={True: True},
                length=equal,
                # The check traces the body twice, and the draws of the second trace follow those of
                # the first. Weights have always been drawn so; in training each block must draw
                # what it draws when unrolled.
                check_constancy_invariants=self.is_initializing(),
            )
            x, _ = scanned(stacked, x, self.branches[1:])
        elif equal:
            # Keys are split as nn.scan splits them, so that dropout is the same in both layouts.
            rngs = {name: LazyRng.create(rng, "blocks") for name, rng in self.scope.rngs.items()}
            rngs = jax.tree.map(lambda key: jax.random.split(key, equal), rngs)
            for index in range(1, self.blocks):
                block = self.branches[index].bind(self.block)
                bound = block(self.features, 1, name=f"block{index + 1}")
                bound.scope.rngs = jax.tree.map(lambda keys, i=index - 1: keys[i], rngs)
                x = bound(x)
        return x


def scaled_branches(scale: Any, blocks: int) -> Branches:
    """Returns the branches of a network for its `branch_scale`."""
    if isinstance(scale, Array):
        return Branches(scales=scale)
    factors, learned = presets.branch_scale(scale, blocks)
    if not learned and set(factors) == {1.0}:
        return Branches()
    return Branches(scales=jnp.asarray(factors, jnp.float32), learned=learned)


def make_norm(*, kind: Any, last: bool = False, zero_last: bool = False, **options: Any) -> Any:
    """Returns a norm whose scale starts at 1; at 0 if it is the branch's `last` and `zero_last`."""
    start = nn.initializers.zeros if last and zero_last else nn.initializers.ones
    return kind(scale_init=start, **options)


def without_strides(block: Any, dilation: int) -> Any:
    """Returns the bound block with convolutions and a shortcut that do not stride.

    Convolutions after the one that would stride are dilated twice as much, so that every second
    row and column of the output is that of the block with strides (the "algorithme à trous").

    Args:
      block: bound.
      dilation: of its first convolutions.
    """
    conv, shortcut = block.keywords["conv"], block.keywords["shortcut"]
    current = dilation  # of this trace of the block

    def dilating(features: int, kernel_size: Any, strides: int = 1, **options: Any) -> Any:
        nonlocal current
        own = current * options.pop("kernel_dilation", 1)
        current *= strides
        return conv(features, kernel_size, kernel_dilation=own, **options)

    return partial(block, conv=dilating, shortcut=lambda features, strides=1: shortcut(features, 1))


def dilated(block: Any, dilation: int) -> Any:
    """Returns the bound block with dilated convolutions."""
    if dilation == 1:
        return block
    return partial(block, conv=partial(block.keywords["conv"], kernel_dilation=dilation))


def rematerialize(block: Any, scan: bool) -> Any:
    """Returns the bound block, which stores only the outputs of convolutions for its gradients."""

    def is_convolution(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in ("conv_general_dilated", "fast_convolution")

    # Inside a scan XLA cannot merge the two computations, so no barrier is needed.
    cls = nn.remat(class_of(block), policy=is_convolution, prevent_cse=not scan)
    return partial(cls, **block.keywords)


def identity_norm(**_: Any) -> Callable[[Images], Images]:
    return lambda x: x


def class_of(bound: Any) -> Any:
    """Returns the class inside nested partials."""
    while isinstance(bound, partial):
        bound = bound.func
    return bound


def uses_scan(loop: str, stages: Sequence[int]) -> bool:
    """Returns whether a network scans over the equal blocks of a stage.

    "auto" unrolls networks of up to 100 blocks and scans deeper ones, which would compile for many
    minutes. On CPU, scanned ResNet-20, 56 and 110 take 1.2 to 1.4 times as long per step as
    unrolled ones (docs/throughput.md). On a GPU, where a scan copies parameters in and gradients
    out, they are predicted to take twice as long, and on a TPU 1.2 to 2.1 times
    (docs/accelerators.md).
    """
    return sum(stages) > 100 if loop == "auto" else loop == "scan"


def build(name_or_config: str | Mapping[str, Any] | Any, **overrides: Any) -> ResNet:
    """Returns a network by name, by config or by fields.

    Args:
      name_or_config: a preset such as "cifar_resnet56" (`resjax models` lists them); or a mapping
        or an object with the fields of a config's `model` section.
      **overrides: fields that replace those, such as `shortcut="none"`, `depth=110`,
        `classes=100`, `loop="scan"`, `dtype="bfloat16"`; `head=` replaces the classifier by another
        module (see `resjax.models.heads`); `output_stride=8` dilates the last stages so that their
        features have this stride.

    Returns:
      A Flax module: `init(key, images)` draws variables, `apply(variables, images, train=False)`
      returns logits (n, classes), `apply(..., method="features")` the outputs of all stages.

    Raises:
      ValueError: no such network exists; one line, with the nearest choice.
    """
    source = {"name": name_or_config} if isinstance(name_or_config, str) else name_or_config
    fields = {**(source if isinstance(source, Mapping) else vars(source)), **overrides}
    output_stride = fields.pop("output_stride", None)
    own = ("classes", "head", "loop", "dtype", *BN_FIELDS, "norm_options", "remat")
    options = {key: value for key in own if (value := fields.pop(key, None)) is not None}
    for key in fields.keys() - set(presets.ARCHITECTURE):
        known = [*presets.ARCHITECTURE, *own, "output_stride"]
        raise ValueError(f"unknown field {key!r}{presets.nearest(key, known)}")
    spec = presets.architecture(**fields)
    if output_stride is not None:
        spec["dilated_stages"] = presets.stages_to_dilate(spec, output_stride)
    if options.get("loop", "auto") not in ("auto", "unroll", "scan"):
        raise ValueError(f"loop must be auto, unroll or scan, not {options['loop']!r}")
    classes = options.pop("classes", presets.CLASSES[spec["family"]])
    options.setdefault("head", heads.ClassificationHead(classes))
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    return ResNet(
        stages=presets.stage_sizes(spec["family"], spec["depth"], spec["block"]),
        block=partial(presets.find("block", spec["block"]), **spec["block_options"]),
        shortcut=partial(presets.find("shortcut", spec["shortcut"]), **spec["shortcut_options"]),
        width=spec["width"] * spec["widen"],
        stem=spec["stem"],
        stem_width=spec["width"],
        stem_pool=spec["stem_pool"],
        dilated_stages=spec["dilated_stages"],
        norm=spec["norm"],
        standardize=spec["standardize"],
        zero_init_residual=fields.get("zero_init_residual") or False,
        stochastic_depth=fields.get("stochastic_depth") or 0.0,
        branch_scale=spec["branch_scale"],
        **options,
    )

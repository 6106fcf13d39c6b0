"""Residual networks: stem, stages of blocks, head.

`conv`, `norm` and `shortcut` are bound once, here, and handed to the blocks (the idea of
google/flax `examples/imagenet` and n2cholas/jax-resnet). A stage is one block that may change the
shape and n - 1 equal ones, so the equal ones can be scanned over: compile time then does not depend
on depth. Unrolled and scanned hold the same network; `layout` converts their variables.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import LazyRng
from jaxtyping import Array, Float

from resjax.models import heads, layout, presets, shortcuts
from resjax.models.convolution import conv as convolution
from resjax.models.normalization import BatchNorm, GroupNorm

Images = Float[Array, "n h w c"]


class ResNet(nn.Module):
    """A residual network, or a plain one: that is the shortcut's matter.

    Attributes:
      stages: blocks in each stage.
      block: a block class, or a partial of one (see `resjax.models.blocks.Block`).
      shortcut: a shortcut class, or a partial of one (see `resjax.models.shortcuts`).
      head: a module that maps the features of all stages to the outputs (see
        `resjax.models.heads`); None returns the features themselves.
      width: features of the first stage; each further stage doubles them.
      stem: "cifar" (3x3 convolution), "imagenet" (7x7 of stride 2, max-pooling), "deep" (three 3x3
        in its place: ResNet-D) or "bit" (as "imagenet", but zeros around what is pooled).
      stem_width: channels out of the stem.
      loop: "unroll" or "scan" the equal blocks of a stage, or "auto": see `scans`.
      dtype: of the computation; parameters and BN statistics stay float32.
      norm: "batch" or "group".
      standardize: every filter of a convolution to mean 0 and variance 1.
      zero_init_residual: start every block as its shortcut; its branch must end in a norm.
      stochastic_depth: rate at which the last block is dropped in training; the l-th of L has l / L
        of it (Huang et al. 2016). Needs a `dropout` key in `apply`; so does dropout.
      bn_momentum, bn_epsilon: 0.9 here is PyTorch's 0.1.
      norm_options: further ones of `BatchNorm`: which images share their statistics.
      remat: keep only the convolutions' outputs for the gradients and compute the rest again; a
        basic block then keeps a quarter of the bytes.
    """

    stages: Sequence[int]
    block: Any
    shortcut: Any
    head: Any = None
    width: int = 16
    stem: str = "cifar"
    stem_width: int = 16
    loop: str = "auto"
    dtype: Any = jnp.float32
    norm: str = "batch"
    standardize: bool = False
    zero_init_residual: bool = False
    stochastic_depth: float = 0.0
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    norm_options: Mapping[str, Any] | None = None
    remat: bool = False

    @nn.nowrap
    def init_with_output(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Initializes as Flax does; both layouts draw the same parameters, through the scan."""
        if scans(self.loop, self.stages):
            return super().init_with_output(*arguments, **options)
        outputs, variables = self.clone(loop="scan").init_with_output(*arguments, **options)
        return outputs, layout.unrolled(variables)

    def __call__(self, images: Images, train: bool = False) -> Any:
        """Returns the outputs of the head: for classification, logits (n, classes) in float32."""
        return self.forward(images, train, with_head=True)

    def features(self, images: Images, train: bool = False) -> heads.Features:
        """Returns the outputs of the stem and every stage: {"stem": ..., "stage1": ..., ...}.

        The variables need no parameters of the head.
        """
        return self.forward(images, train, with_head=False)

    @nn.compact
    def forward(self, images: Images, train: bool, with_head: bool) -> Any:
        conv = partial(convolution, dtype=self.dtype, standardize=self.standardize)
        running = partial(
            BatchNorm,
            **(self.norm_options or {}),
            use_running_average=not train,
            momentum=self.bn_momentum,
        )
        norm = partial(
            normalization,
            kind=running if self.norm == "batch" else GroupNorm,
            zero_last=self.zero_init_residual,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
        )
        act = nn.relu
        preactivation = getattr(block_class(self.block), "preactivation", False)
        # A projection of activated images is not normalised [H16, the authors' code].
        shortcut_norm = no_norm if preactivation else norm
        shortcut = partial(self.shortcut, conv=conv, norm=shortcut_norm, name="shortcut")
        block = partial(self.block, conv=conv, norm=norm, act=act, shortcut=shortcut)
        shares = preactivation and hasattr(block_class(self.block), "share")
        first = partial(block, share=True) if shares else block

        x = Stem(self.stem, self.stem_width, conv, norm, act, preactivation, name="stem")(
            jnp.asarray(images, self.dtype)
        )
        outputs = {"stem": x}
        depth, scan = sum(self.stages), scans(self.loop, self.stages)
        if self.remat:
            first, block = rematerialised(first, scan), rematerialised(block, scan)
        for index, blocks in enumerate(self.stages):
            rates = None
            if self.stochastic_depth and train and self.has_rng("dropout"):
                done = sum(self.stages[:index])
                rates = self.stochastic_depth * jnp.arange(done + 1, done + blocks + 1) / depth
            x = Stage(
                blocks=blocks,
                features=self.width * 2**index,
                strides=1 if index == 0 else 2,
                first=first if index == 0 else block,
                block=block,
                rates=rates,
                scan=scan,
                name=f"stage{index + 1}",
            )(x)
            outputs[f"stage{index + 1}"] = x
        if preactivation:  # the last addition is not activated yet [H16 appendix]
            x = outputs[f"stage{len(self.stages)}"] = act(norm(name="norm")(x))
        if with_head and self.head is not None:
            return heads.bind(self.head, conv=conv, norm=norm, act=act)(outputs)
        return outputs


class Stem(nn.Module):
    """The layers before the first stage."""

    kind: str
    features: int
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
        if self.kind == "bit":  # its authors pad negative values with zeros, and a maximum shows it
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        if self.kind != "cifar":
            rim = 0 if self.kind == "bit" else 1
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((rim, rim), (rim, rim)))
        return x


class Stage(nn.Module):
    """Blocks of equal width: `block1`, which may change the shape, then equal ones.

    Unrolled these are `block2`, `block3`, ...; scanned they are `blocks`, stacked along axis 0.
    """

    blocks: int
    features: int
    strides: int
    first: Any
    block: Any
    rates: Any  # of stochastic depth, one a block, or None
    scan: bool

    @nn.compact
    def __call__(self, x: Images) -> Images:
        rates = [None] * self.blocks if self.rates is None else self.rates
        x = _at_rate(self.first, rates[0])(self.features, self.strides, name="block1")(x)
        if self.scan and self.blocks > 1:
            equal = self.block(self.features, 1, name="blocks")

            def step(equal: Any, x: Images, rate: Any) -> tuple[Images, None]:
                # The rate is known in here only, so the block is bound to it in here.
                bound = _at_rate(self.block, rate)
                return bound(self.features, 1, parent=equal.scope)(x), None

            scanned = nn.scan(
                step,
                variable_axes={True: 0},  # any collection, of a block or of a diagnostic
                split_rngs={True: True},
                length=self.blocks - 1,
                check_constancy_invariants=self.is_initializing(),
            )
            x, _ = scanned(equal, x, None if self.rates is None else self.rates[1:])
        else:
            rngs = {name: LazyRng.create(rng, "blocks") for name, rng in self.scope.rngs.items()}
            rngs = jax.tree.map(lambda key: jax.random.split(key, self.blocks - 1), rngs)
            for index in range(1, self.blocks):
                block = _at_rate(self.block, rates[index])(
                    self.features, 1, name=f"block{index + 1}"
                )
                block.scope.rngs = jax.tree.map(lambda keys, i=index - 1: keys[i], rngs)
                x = block(x)
        return x


def _at_rate(block: Any, rate: Any) -> Any:
    """The bound block, its branch dropped at `rate`: its shortcut scales the branch."""
    if rate is None:
        return block
    bound = block.keywords["shortcut"]

    def shortcut(features: int, strides: int) -> Callable[[Images], Any]:
        carry, survival = bound(features, strides), shortcuts.Survival(rate, name="survival")
        return lambda x: shortcuts.scale_branch(carry(x), survival(x.shape[0]))

    return partial(block, shortcut=shortcut)


def normalization(*, kind: Any, last: bool = False, zero_last: bool = False, **options: Any) -> Any:
    """A norm whose scale starts at 1, or at 0 where `zero_last` and it is a branch's last."""
    start = nn.initializers.zeros if last and zero_last else nn.initializers.ones
    return kind(scale_init=start, **options)


def rematerialised(block: Any, scan: bool) -> Any:
    """The bound block, of whose intermediate results only those of convolutions are kept."""

    def keep(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name == "conv_general_dilated"

    # Within a scan nothing can be merged with the first computation, so no barrier is needed.
    cls = nn.remat(block_class(block), policy=keep, prevent_cse=not scan)
    return partial(cls, **block.keywords)


def no_norm(**_: Any) -> Callable[[Images], Images]:
    return lambda x: x


def block_class(block: Any) -> Any:
    """The class under partials."""
    while isinstance(block, partial):
        block = block.func
    return block


def scans(loop: str, stages: Sequence[int]) -> bool:
    """Whether to scan over the equal blocks of a stage.

    "auto" scans on CPU, where it compiles several times faster and, given the gradients of
    `resjax.models.convolution`, runs as fast; elsewhere it scans only networks so deep that an
    unrolled one takes many minutes to compile.
    """
    if loop == "auto":
        return jax.default_backend() == "cpu" or sum(stages) > 100
    return loop == "scan"


def build(name_or_config: str | Mapping[str, Any] | Any, **overrides: Any) -> ResNet:
    """A network by name, by config, or by fields.

    Args:
      name_or_config: a preset (`resjax models` lists them), such as "cifar_resnet56"; or a mapping
        or object with the fields of a config's `model` section.
      **overrides: fields over it, such as `shortcut="none"`, `depth=110`, `classes=100`,
        `loop="scan"`, `dtype="bfloat16"`; `head=` a module in place of that of classification.

    Returns:
      A module: `init(key, images)`, `apply(variables, images, train=False)` gives logits (n,
      classes), `apply(..., method="features")` gives what every stage puts out.

    Raises:
      ValueError: there is no such network; one line, with the nearest choice.
    """
    if isinstance(name_or_config, str):
        fields: dict[str, Any] = {"name": name_or_config}
    else:
        source = name_or_config
        fields = dict(source if isinstance(source, Mapping) else vars(source))
    fields = {**fields, **overrides}
    own = ("classes", "head", "loop", "dtype", "bn_momentum", "bn_epsilon", "norm_options", "remat")
    options = {key: value for key in own if (value := fields.pop(key, None)) is not None}
    unknown = fields.keys() - set(presets.ARCHITECTURE)
    if unknown:
        word = sorted(unknown)[0]
        raise ValueError(
            f"unknown field {word!r}{presets.nearest(word, [*presets.ARCHITECTURE, *own])}"
        )
    spec = presets.architecture(**fields)
    if options.get("loop", "auto") not in ("auto", "unroll", "scan"):
        raise ValueError(f"loop must be auto, unroll or scan, not {options['loop']!r}")
    classes = options.pop("classes", 1000 if spec["family"] == "imagenet" else 10)
    options.setdefault("head", heads.ClassificationHead(classes))
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    return ResNet(
        stages=presets.stage_sizes(spec["family"], spec["depth"], spec["block"]),
        block=partial(presets.find(spec["block"], presets.BLOCKS), **spec["block_options"]),
        shortcut=partial(
            presets.find(spec["shortcut"], presets.SHORTCUTS), **spec["shortcut_options"]
        ),
        width=spec["width"] * spec["widen"],
        stem=spec["stem"],
        stem_width=spec["width"],
        norm=spec["norm"],
        standardize=spec["standardize"],
        zero_init_residual=fields.get("zero_init_residual") or False,
        stochastic_depth=fields.get("stochastic_depth") or 0.0,
        **options,
    )

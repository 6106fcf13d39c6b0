"""Every block equals its formula, drawn in He et al. 2015 figure 5 and 2016 figure 4."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from resjax.models.blocks import (
    BasicBlock,
    BNAfterAdditionBasicBlock,
    BNAfterAdditionBottleneckBlock,
    BottleneckBlock,
    FixupBasicBlock,
    FixupBottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ReLUBeforeAdditionBasicBlock,
    ReLUBeforeAdditionBottleneckBlock,
    ReLUPreActBasicBlock,
    ReLUPreActBottleneckBlock,
    SqueezeExcite,
)
from resjax.models.convolution import conv
from resjax.models.count import layers
from resjax.models.normalization import BatchNorm, Bias
from resjax.models.resnet import build, make_norm
from resjax.models.shortcuts import Pad, Scaled, pad
from resjax.xla.compile_options import quick_compile

jit = partial(jax.jit, compiler_options=quick_compile())
X = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
POSTACTIVATION = (BasicBlock, BottleneckBlock)
PREACTIVATION = (PreActBasicBlock, PreActBottleneckBlock)

norm = partial(make_norm, kind=BatchNorm, use_running_average=True)


def bound(cls, features, strides, shortcut=Pad, norm=norm, **options):
    """Returns a block bound as the network binds it."""
    added = partial(shortcut, conv=conv, norm=norm, name="shortcut")
    return cls(features, strides, conv=conv, norm=norm, act=nn.relu, shortcut=added, **options)


def layers_of(variables):
    """Returns the block's convolutions and norms as functions of their number."""
    params, statistics = variables["params"], variables.get("batch_stats")

    def convolve(number, x, stride=1):
        kernel = params[f"Conv_{number}"]["kernel"]
        half = (len(kernel) // 2,) * 2
        layout = ("NHWC", "HWIO", "NHWC")
        groups = x.shape[-1] // kernel.shape[2]
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            (half, half),
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    def normalize(number, x):
        name = f"BatchNorm_{number}"
        mean, var = statistics[name]["mean"], statistics[name]["var"]
        return (x - mean) / jnp.sqrt(var + 1e-5) * params[name]["scale"] + params[name]["bias"]

    return convolve, normalize


relu = jax.nn.relu


def basic(x, features, s, conv, norm):
    y = norm(1, conv(1, relu(norm(0, conv(0, x, s)))))
    return relu(y + pad(x, features, s))


def bottleneck(x, features, s, conv, norm, in_1x1=False):
    first, second = (s, 1) if in_1x1 else (1, s)
    y = norm(2, conv(2, relu(norm(1, conv(1, relu(norm(0, conv(0, x, first))), second)))))
    return relu(y + pad(x, 4 * features, s))


def preact_basic(x, features, s, conv, norm, share=False):
    active = relu(norm(0, x))
    y = conv(1, relu(norm(1, conv(0, active, s))))
    changes = share or s > 1 or features != x.shape[-1]
    return y + pad(active if changes else x, features, s)


def preact_bottleneck(x, features, s, conv, norm, share=False, in_1x1=True):
    first, second = (s, 1) if in_1x1 else (1, s)
    active = relu(norm(0, x))
    y = conv(2, relu(norm(2, conv(1, relu(norm(1, conv(0, active, first))), second))))
    changes = share or s > 1 or 4 * features != x.shape[-1]
    return y + pad(active if changes else x, 4 * features, s)


def basic_weights(x, features, s, conv, norm):
    return conv(1, relu(norm(0, conv(0, x, s))))


def bottleneck_weights(x, features, s, conv, norm):
    return conv(2, relu(norm(1, conv(1, relu(norm(0, conv(0, x))), s))))


def bn_after_addition(weights, expansion, x, features, s, conv, norm):
    total = weights(x, features, s, conv, norm) + pad(x, expansion * features, s)
    return relu(norm(2 if expansion > 1 else 1, total))


def relu_before_addition(weights, expansion, x, features, s, conv, norm):
    y = norm(2 if expansion > 1 else 1, weights(x, features, s, conv, norm))
    return relu(y) + pad(x, expansion * features, s)


def relu_preact(weights, expansion, x, features, s, conv, norm):
    y = norm(2 if expansion > 1 else 1, weights(relu(x), features, s, conv, norm))
    changes = s > 1 or expansion * features != x.shape[-1]
    return y + pad(relu(x) if changes else x, expansion * features, s)


def fixup(cls, x, features, s, conv, biases, scale):
    """Zhang et al. 2019, figure 1: a bias before each convolution and activation."""
    y = biased = x + biases[0]
    strides = (s, 1) if cls.layers == 2 else (1, s, 1)
    for number, stride in enumerate(strides[:-1]):
        y = relu(conv(number, y, stride) + biases[2 * number + 1]) + biases[2 * number + 2]
    y = scale * conv(cls.layers - 1, y) + biases[-1]
    out = cls.expansion * features
    return relu(y + pad(biased if s > 1 or out != x.shape[-1] else x, out, s))


ORDERS = [
    (cls, {}, partial(order, weights, cls.expansion))
    for order, classes in {
        bn_after_addition: (BNAfterAdditionBasicBlock, BNAfterAdditionBottleneckBlock),
        relu_before_addition: (ReLUBeforeAdditionBasicBlock, ReLUBeforeAdditionBottleneckBlock),
        relu_preact: (ReLUPreActBasicBlock, ReLUPreActBottleneckBlock),
    }.items()
    for cls, weights in zip(classes, (basic_weights, bottleneck_weights), strict=True)
]


@pytest.mark.parametrize(
    ("cls", "options", "formula"),
    [
        *ORDERS,
        (BasicBlock, {}, basic),
        (BottleneckBlock, {}, bottleneck),
        (BottleneckBlock, {"stride_in_1x1": True}, partial(bottleneck, in_1x1=True)),
        (BottleneckBlock, {"groups": 2, "group_width": 64}, bottleneck),
        (PreActBasicBlock, {}, preact_basic),
        (PreActBasicBlock, {"share": True}, partial(preact_basic, share=True)),
        (PreActBottleneckBlock, {}, preact_bottleneck),
        (PreActBottleneckBlock, {"share": True}, partial(preact_bottleneck, share=True)),
        (PreActBottleneckBlock, {"stride_in_1x1": False}, partial(preact_bottleneck, in_1x1=False)),
    ],
)
@pytest.mark.parametrize(("features", "strides"), [(4, 1), (4, 2), (1, 1)])
def test_a_block_is_its_formula(draw, cls, options, formula, features, strides):
    if cls.expansion == 1 and features == 1:
        features = 6  # one feature preserves the width of a bottleneck but not of a basic block
    block = bound(cls, features, strides, **options)
    variables = draw(block, X)

    @jit
    def both(variables, x):
        return block.apply(variables, x), formula(x, features, strides, *layers_of(variables))

    got, expected = both(variables, X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "features", "strides"),
    [
        *((FixupBasicBlock, 4, 1), (FixupBasicBlock, 4, 2), (FixupBasicBlock, 6, 1)),
        *((FixupBottleneckBlock, 1, 1), (FixupBottleneckBlock, 4, 2), (FixupBottleneckBlock, 4, 1)),
    ],
)
def test_a_fixup_block_is_its_formula(draw, cls, features, strides):
    block = bound(cls, features, strides, norm=partial(make_norm, kind=partial(Bias, scalar=True)))
    variables = draw(block, X)
    params = variables["params"]
    biases = [params[f"Bias_{number}"]["bias"] for number in range(2 * cls.layers)]
    assert all(np.ndim(bias) == 0 for bias in biases)

    @jit
    def both(variables, x):
        conv, _ = layers_of(variables)
        expected = fixup(cls, x, features, strides, conv, biases, params["scale"])
        return block.apply(variables, x), expected

    got, expected = both(variables, X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "power"), [(FixupBasicBlock, -1 / 2), (FixupBottleneckBlock, -1 / 4)]
)
def test_fixup_starts_weights_smaller_the_deeper_the_network(cls, power):
    """All but the last convolution start at the usual values times L^(-1 / (2m - 2)) [Z19]."""
    blocks = 81
    block = bound(cls, 64, 1, norm=partial(make_norm, kind=Bias), network_blocks=blocks)
    x = np.zeros((1, 1, 1, 64 * cls.expansion), np.float32)
    params = jit(block.init)(jax.random.key(0), x)["params"]
    *inner, last = (params[f"Conv_{number}"]["kernel"] for number in range(cls.layers))
    assert (last == 0).all()
    for kernel in inner:
        usual = (2 / np.prod(kernel.shape[:-1])) ** 0.5
        assert float(kernel.std() / usual) == pytest.approx(blocks**power, rel=0.03)


class Gated(Pad):
    def __call__(self, x):
        return Scaled(super().__call__(x), 0.0)


@pytest.mark.parametrize("cls", [*POSTACTIVATION, *PREACTIVATION, FixupBasicBlock])
def test_with_a_branch_scale_of_zero_a_block_returns_its_shortcut(draw, cls):
    block = bound(cls, 4 // cls.expansion, 1, Gated)
    variables = draw(block, X)
    expected = X if cls.preactivation else np.maximum(X, 0)
    assert (jit(block.apply)(variables, X) == expected).all()


@pytest.mark.parametrize("cls", POSTACTIVATION)
@pytest.mark.parametrize("options", [{}, {"se_reduction": 2}])
def test_with_zero_init_a_block_starts_as_its_activated_shortcut(cls, options):
    training = partial(norm, use_running_average=False, zero_last=True)
    block = bound(cls, 4, 2, norm=training, **options)
    (y, _) = jit(block.init_with_output)(jax.random.key(0), X)
    assert (y == np.maximum(pad(X, 4 * cls.expansion, 2), 0)).all()


def test_squeeze_and_excitation_gates_channels_by_their_means(draw):
    block = SqueezeExcite(2, conv, nn.relu)
    variables = draw(block, X)
    squeeze, excite = (variables["params"][f"Conv_{i}"] for i in (0, 1))
    assert squeeze["kernel"].shape == (1, 1, 4, 2)
    mean = X.mean((1, 2))
    squeezed = np.maximum(mean @ squeeze["kernel"][0, 0] + squeeze["bias"], 0)
    gate = 1 / (1 + np.exp(-(squeezed @ excite["kernel"][0, 0] + excite["bias"])))
    expected = X * gate[:, None, None]
    np.testing.assert_allclose(jit(block.apply)(variables, X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", POSTACTIVATION)
def test_squeeze_and_excitation_gates_the_branch_and_not_the_shortcut(draw, cls):
    block = bound(cls, 4 // cls.expansion, 1, se_reduction=2)
    variables = draw(block, X)
    variables["params"]["SqueezeExcite_0"]["Conv_1"]["bias"][:] = -1e3  # all gates shut
    assert (jit(block.apply)(variables, X) == np.maximum(X, 0)).all()


@pytest.mark.parametrize(
    ("stride_in_1x1", "strided"), [(False, [8, 4, 4, 4]), (True, [4, 4, 4, 4])]
)
def test_a_bottleneck_strides_in_its_3x3_or_in_its_first_1x1(stride_in_1x1, strided):
    options = {"stride_in_1x1": stride_in_1x1}
    model = build({}, depth=20, block="bottleneck", shortcut="project", block_options=options)
    sides = {}
    for layer in layers(model, (8, 8, 3)):
        if layer.kind == "Conv":
            block = "/".join(layer.path.split("/")[:2])
            sides.setdefault(block, []).append(layer.output[0])
    assert sides["stage1/block1"] == [8] * 4
    assert sides["stage2/block1"] == strided  # the projection comes last
    assert sides["stage2/block2"] == [4] * 3


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("resnet50", (3, 3, 64, 64)),
        ("resnext50_32x4d", (3, 3, 4, 128)),
        ("resnext101_32x8d", (3, 3, 8, 256)),
        ("wide_resnet50_2", (3, 3, 128, 128)),
    ],
)
def test_groups_widen_only_the_3x3(name, kernel):
    images = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(build(name).init, jax.random.key(0), images)["params"]
    block = params["stage1"]["block1"]
    assert block["Conv_1"]["kernel"].shape == kernel
    assert block["Conv_2"]["kernel"].shape == (1, 1, kernel[-1], 256)

"""Diagnostics of the forward pass: which layers they record, and what their values mean.

tests/train/test_parallel.py checks all values in every layout and on several devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resjax.diagnostics import per_layer
from resjax.diagnostics.forward import cosine, forward_values
from resjax.diagnostics.taps import PROBES, TappedModel
from resjax.models import layout
from resjax.models.blocks import BasicBlock
from resjax.models.resnet import build
from resjax.models.shortcuts import Pad

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def network(**fields):
    fields = {"width": 4, "depth": 11 if fields.get("block") == "bottleneck" else 8} | fields
    return build({}, **fields).clone(stages=(2, 1))


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def recorded(model):
    """Returns the layers of each diagnostic of the forward pass; compiles nothing."""
    _, sums = TappedModel(model, forward=True).zeros(shapes_of(model), IMAGES.shape[1:])
    values = jax.eval_shape(forward_values, sums)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), values)
    return {name: sorted(per_layer(each), key=layout.natural_order) for name, each in zeros.items()}


def diagnose(model, variables, train=True):
    """Returns the diagnostics of the forward pass, by name and layer."""
    tapped = TappedModel(model, forward=True)

    def apply(variables):
        probes, sums = tapped.zeros(variables, IMAGES.shape[1:])
        given = {
            "params": {**variables["params"], PROBES: probes},
            "batch_stats": {**variables.get("batch_stats", {}), "forward": sums},
        }
        rngs = {"dropout": jax.random.key(0)}
        _, updated = tapped.apply(given, IMAGES, train=train, mutable=["batch_stats"], rngs=rngs)
        return forward_values(updated["batch_stats"]["forward"])

    found = jax.device_get(jax.jit(apply)(variables))
    return {name: per_layer(values) for name, values in found.items()}


# Which layers there are.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "BatchNorm_0 BatchNorm_1"),
        ({"block": "bottleneck"}, "BatchNorm_0 BatchNorm_1 BatchNorm_2"),
        ({"block": "preact_basic"}, "BatchNorm_0 BatchNorm_1 Conv_1"),
        ({"norm": "none"}, "Bias_0 Bias_1"),
        ({"norm": "group", "width": 32}, "GroupNorm_0 GroupNorm_1"),
        ({"shortcut": "conv"}, "BatchNorm_0 BatchNorm_1 shortcut/Conv_0"),
        ({"shortcut": "project_all"}, "BatchNorm_0 BatchNorm_1 shortcut/BatchNorm_0"),
        (
            {"block_options": {"se_reduction": 2}},
            "BatchNorm_0 BatchNorm_1 SqueezeExcite_0/Conv_0 SqueezeExcite_0/Conv_1",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", [{"loop": "scan"}, {"loop": "unroll", "remat": True}], ids=str)
def test_a_response_is_that_of_a_norm_or_of_a_layer_without_one(fields, expected, layers):
    found = recorded(network(**fields, **layers))
    blocks = ["stage1/block1", "stage1/block2", "stage2/block1"]
    for block in blocks:
        inside = [path for path in found["response_std"] if path.startswith(f"{block}/")]
        assert inside == [f"{block}/{name}" for name in expected.split()]
    assert found["response_mean"] == found["response_std"]
    assert found["branch_share"] == found["input_output_cosine"] == blocks
    preactivation = fields.get("block") == "preact_basic"
    ends = [path for path in found["response_std"] if not path.startswith("stage")]
    stem = "stem/Conv_0" if preactivation else f"stem/{expected.split()[0]}"
    assert ends == [stem, *["norm"] * preactivation, "head"]
    assert f"{blocks[-1]}/relu_1" in found["dead_relu_share"]


# What the values mean.


@pytest.fixture(scope="module")
def variables():
    """Variables of a basic network, in which nothing is zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (
            rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32)
            * rng.choice([-1, 1, 1], leaf.shape[-1:])
        ),
        shapes_of(network(loop="scan"))["params"],
    )


def statistics(model):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes_of(model)["batch_stats"])


def of(variables, **fields):
    model = network(loop="scan", **fields)
    return diagnose(model, {"params": variables, "batch_stats": statistics(model)})


def test_a_plain_block_is_all_branch_and_a_scaled_branch_counts_as_scaled(variables):
    plain, residual = of(variables, shortcut="none"), of(variables)
    assert set(plain["branch_share"].values()) == {1.0}
    # Scaled from outside, and by a shortcut that scales both.
    options = {"factor": 0.125, "branch_factor": 0.25}
    half = of(variables, branch_scale=0.5)
    scaled = of(variables, shortcut="scale", shortcut_options=options)
    first = "stage1/block1"
    ratio = residual["branch_share"][first] / (1 - residual["branch_share"][first])
    for found, factor in ((half, 0.5), (scaled, 2.0)):
        share = found["branch_share"][first]
        assert share / (1 - share) == pytest.approx(factor * ratio, rel=1e-5)


def test_a_block_without_a_branch_is_the_identity_where_the_shape_stays(variables):
    found = of(variables, branch_scale=0.0)
    assert set(found["branch_share"].values()) == {0.0}
    # The inputs of all blocks are nonnegative already.
    assert list(found["input_output_cosine"].values()) == pytest.approx([1.0] * 3, rel=1e-5)


def test_a_block_whose_output_is_zero_has_a_share_and_a_cosine_of_zero(variables):
    params = jax.tree.map_with_path(
        lambda path, leaf: leaf * ("BatchNorm_1" not in layout.path_name(path)), variables
    )
    found = of(params, shortcut="none")
    assert set(found["branch_share"].values()) == {0.0}
    assert set(found["input_output_cosine"].values()) == {0.0}


def test_outputs_of_fewer_channels_and_vectors_have_no_cosine():
    assert cosine(IMAGES, IMAGES[..., :2]) == {}
    assert cosine(IMAGES[:, 0, 0], IMAGES[:, 0, 0]) == {}
    assert cosine(IMAGES, IMAGES)["cosine"] == pytest.approx(1, rel=1e-5)


def test_a_relu_is_dead_if_it_is_zero_for_all_images_and_pixels(variables):
    bias = np.zeros(4, np.float32)
    bias[:3] = -1e3
    params = jax.tree.map(lambda leaf: leaf, variables)
    params["stage1"]["blocks"]["BatchNorm_0"]["bias"] = bias[None]
    found = of(params)["dead_relu_share"]
    assert found["stage1/block2/relu_0"] == 0.75
    assert found["stage1/block1/relu_0"] == found["stem/relu_0"] == 0.0


class Carried:
    """An object of a user's that an array can be added to."""

    def __init__(self, x):
        self._x = x

    def __radd__(self, branch):
        return branch + self._x


class CarryingPad(Pad):
    def __call__(self, x):
        return Carried(super().__call__(x))


def test_an_object_that_a_users_shortcut_adds_counts_as_what_it_adds(variables):
    expected = of(variables)["branch_share"]
    model = network(loop="scan").clone(shortcut=CarryingPad)
    found = diagnose(model, {"params": variables, "batch_stats": statistics(model)})
    assert found["branch_share"] == pytest.approx(expected, rel=1e-4)


class StackedAddition(BasicBlock):
    """A user's block that takes its shortcut for an array."""

    @nn.compact
    def __call__(self, x):
        y = self.norm()(self.conv(self.features, 3, self.strides)(x))
        return self.act(jnp.add(y, self.shortcut(self.features, self.strides)(x)))


def test_a_block_that_takes_its_shortcut_for_an_array_is_recorded_without_its_branch():
    found = recorded(network(loop="scan").clone(block=StackedAddition))
    assert found["branch_share"] == []
    assert len(found["input_output_cosine"]) == 3
    assert "stage1/block2/BatchNorm_0" in found["response_std"]

"""Heads: what they receive, what the network binds to them, and where their parameters are."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resjax.models.convolution import he_normal
from resjax.models.heads import ClassificationHead
from resjax.models.resnet import build
from resjax.xla.compile_options import quick_compile

jit = partial(jax.jit, compiler_options=quick_compile())
IMAGES = np.random.default_rng(0).normal(size=(3, 5, 5, 3)).astype(np.float32)


def network(**fields):
    return build({}, depth=8, width=4, **fields).clone(stages=(2, 1))


def test_the_classifier_draws_the_same_weights_as_a_dense_layer_named_head():
    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(7, kernel_init=he_normal, name="head")(x)

    key = jax.random.key(1)
    expected = jit(Reference().init)(key, np.zeros((1, 8), np.float32))["params"]["head"]
    params = jit(network(classes=7).init)(key, IMAGES)["params"]["head"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_without_classes_the_outputs_are_the_means_of_the_last_stage(draw):
    model = network(classes=0)
    variables = draw(model, IMAGES)
    assert "head" not in variables["params"]
    features = jit(partial(model.apply, method="features"))(variables, IMAGES)
    means = features["stage2"].mean((1, 2))
    np.testing.assert_allclose(jit(model.apply)(variables, IMAGES), means, rtol=1e-5, atol=1e-6)


def test_without_a_head_the_outputs_are_the_features(draw):
    model = network().clone(head=None)
    variables = draw(model, IMAGES)
    outputs, features = (
        jit(partial(model.apply, method=method))(variables, IMAGES) for method in (None, "features")
    )
    jax.tree.map(np.testing.assert_array_equal, outputs, features)


class Pixels(nn.Module):
    """A head of one logit per pixel, from both stages, with the layers of the network."""

    conv: Any = None
    norm: Any = None
    act: Any = nn.tanh

    @nn.compact
    def __call__(self, features):
        deep = jax.image.resize(features["stage2"], (3, 5, 5, 8), "nearest")
        x = jnp.concatenate([features["stage1"], deep], -1)
        x = self.act(self.norm()(self.conv(4, 3)(x)))
        return self.conv(1, 1)(x).astype(jnp.float32)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("block", ["basic", "preact_basic"])
def test_a_users_head_gets_the_features_and_the_layers_of_the_network(loop, block):
    model = network(head=Pixels(), loop=loop, block=block, dtype="bfloat16")
    seen = {}

    def record(call, arguments, keywords, context):
        if context.module.path[:1] == ("head",):
            seen[context.module.path] = context.module
        output = call(*arguments, **keywords)
        if context.module.path == ("head", "Conv_0"):
            assert output.dtype == jnp.bfloat16
        return output

    variables = jit(model.init)(jax.random.key(0), IMAGES)
    assert variables["params"]["head"].keys() == {"Conv_0", "BatchNorm_0", "Conv_1"}
    with nn.intercept_methods(record):
        outputs, changed = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    assert outputs.shape == (3, 5, 5, 1)
    assert (changed["batch_stats"]["head"]["BatchNorm_0"]["mean"] != 0).any()
    assert not seen["head", "BatchNorm_0"].use_running_average
    assert seen[("head",)].act is nn.tanh  # a field that is set stays
    model.apply(variables, IMAGES)  # in evaluation the statistics are immutable


def test_a_clone_can_have_another_head():
    ten, seven = network(), network(classes=7)
    assert (ten.head, seven.head) == (ClassificationHead(10), ClassificationHead(7))
    shapes = jax.eval_shape(ten.clone(head=seven.head).init, jax.random.key(0), IMAGES)
    assert shapes["params"]["head"]["bias"].shape == (7,)

"""Changes of weights, which leave the rest as it was."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resjax.data.normalization import normalize
from resjax.errors import UserError
from resjax.transfer import surgery
from resjax.transfer.weights import flatten


def logits(weights, images):
    network = weights.network(loop="unroll")
    return np.asarray(jax.jit(network.apply)(weights.variables, images))


@pytest.fixture(scope="module")
def grey():
    return np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)


@pytest.mark.parametrize("zero", [False, True])
def test_a_new_head_leaves_the_backbone_unchanged(weights, grey, zero):
    made = surgery.new_head(weights, 7, jax.random.key(1), zero=zero)
    assert logits(made, np.repeat(grey, 3, -1) / 255.0).shape == (2, 7)
    assert made.class_names == ()
    before, after = flatten(weights.variables), flatten(made.variables)
    assert after["params/head/kernel"].any() != zero
    for name in before.keys() - {"params/head/kernel", "params/head/bias"}:
        assert after[name] is before[name]


def test_a_new_head_is_drawn_with_its_key(weights):
    heads = [
        surgery.new_head(weights, 200, jax.random.key(seed)).variables["params"]["head"]["kernel"]
        for seed in (1, 2, 1)
    ]
    assert not np.array_equal(heads[0], heads[1])
    np.testing.assert_array_equal(heads[0], heads[2])
    assert heads[0].std() == pytest.approx((2 / len(heads[0])) ** 0.5, rel=0.1)  # He et al. 2015


def test_a_backbone_outputs_the_input_of_the_head(weights, grey):
    images = np.repeat(grey, 3, -1) / np.float32(255)
    head = weights.variables["params"]["head"]
    means = logits(surgery.backbone(weights), images)
    np.testing.assert_allclose(
        means @ head["kernel"] + head["bias"], logits(weights, images), rtol=1e-4, atol=1e-4
    )
    again = surgery.new_head(surgery.backbone(weights), 4)
    assert again.variables["params"]["head"]["kernel"].shape == (means.shape[1], 4)


def test_a_grayscale_image_keeps_its_output_as_rgb(weights, grey):
    """Exactly, if all channels are normalized alike."""
    alike = surgery.with_channels(weights, 1).statistics
    made = surgery.with_channels(weights, 1)
    as_rgb = logits(weights, np.repeat(normalize(grey, alike), 3, -1))
    np.testing.assert_allclose(logits(made, normalize(grey, alike)), as_rgb, rtol=1e-4, atol=1e-5)


@given(channels=st.integers(1, 9), value=st.floats(-3, 3, width=32))
def test_a_constant_image_keeps_its_output_of_the_first_convolution(weights, channels, value):
    kernel = weights.variables["params"]["stem"]["Conv_0"]["kernel"]
    made = surgery.with_channels(weights, channels)
    changed = made.variables["params"]["stem"]["Conv_0"]["kernel"]
    assert changed.shape == (7, 7, channels, 8)
    if channels % 3 == 0 or channels == 1:
        expected = value * kernel.sum((0, 1, 2))
        np.testing.assert_allclose(value * changed.sum((0, 1, 2)), expected, rtol=1e-3, atol=1e-4)
    assert made.statistics.mean.shape == (channels,)
    assert made.preprocessing.channels == channels


def test_fitting_arrays_are_copied_and_the_others_reported(make_weights, weights):
    other = make_weights(depth=18, classes=9)
    found = surgery.merge(other.variables, weights)
    assert {path for path in found.new if "block2" not in path} == {
        "params/head/kernel",
        "params/head/bias",
    }
    assert set(found.unused) == {"params/head/kernel", "params/head/bias"}
    merged = flatten(found.variables)
    for path in found.copied:
        np.testing.assert_array_equal(merged[path], flatten(weights.variables)[path])
    for path in found.new:
        np.testing.assert_array_equal(merged[path], flatten(other.variables)[path])
    assert f"{len(found.copied)} arrays copied" in found.report()
    with pytest.raises(UserError, match="no array of the weights"):
        surgery.merge({"params": {"x": np.zeros(3)}}, weights)

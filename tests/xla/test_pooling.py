"""The maximum over windows and its gradient equal Flax's on CPU too."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from resjax.xla.convolution import as_written
from resjax.xla.pooling import max_pool


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    side=st.integers(2, 3),
    stride=st.integers(1, 3),
    border=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_equals_flax_with_ties_too(height, width, side, stride, border, seed):
    rng = np.random.default_rng(seed)
    x = jnp.array(rng.integers(-2, 3, (2, height, width, 3)), jnp.float32)

    def flax(x):
        return nn.max_pool(x, (side,) * 2, (stride,) * 2, ((border,) * 2,) * 2)

    expected, pull_expected = jax.vjp(flax, x)
    got, pull = jax.vjp(lambda x: max_pool(x, side, stride, border), x)
    np.testing.assert_array_equal(got, expected)
    # Whole numbers, so that their sums are exact in any order.
    slope = jnp.array(rng.integers(-9, 10, expected.shape), jnp.float32)
    np.testing.assert_array_equal(pull(slope)[0], pull_expected(slope)[0])


def test_nan_passes_through():
    x = jnp.zeros((1, 6, 6, 1)).at[0, 2, 3, 0].set(jnp.nan)
    reached = jnp.isnan(max_pool(x, 3, 2, 1))[0, :, :, 0]
    np.testing.assert_array_equal(reached, [[0, 0, 0], [0, 1, 1], [0, 0, 0]])


def test_counts_and_exports_see_flax_windows():
    x = jnp.zeros((1, 6, 6, 1))
    with as_written():
        assert "reduce_window_max" in str(jax.make_jaxpr(lambda x: max_pool(x, 3, 2, 1))(x))

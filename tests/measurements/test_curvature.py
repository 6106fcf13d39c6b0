"""Curvature agrees with the dense Hessian, with power iteration and with finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import resjax
from resjax.errors import UserError
from resjax.measurements import Hessian
from resjax.models import layout
from resjax.tasks.base import DatasetInfo
from resjax.tasks.classification import Classification

SIDE, CLASSES = 4, 3
TASK = Classification(DatasetInfo(tuple("abc"), (SIDE, SIDE, 3)))
BATCH = 8


def made_batches(count, weights=None):
    """Returns random batches, with weights (count, BATCH) that are 1 by default."""
    rng = np.random.default_rng(0)
    weights = np.ones((count, BATCH), np.float32) if weights is None else weights
    return [
        {
            "image": rng.normal(size=(BATCH, SIDE, SIDE, 3)).astype(np.float32),
            "label": rng.integers(CLASSES, size=BATCH),
            "weight": weight,
        }
        for weight in weights
    ]


MODEL = resjax.build("cifar_resnet8", width=2, classes=CLASSES).clone(stages=(2, 1))


@pytest.fixture(scope="module")
def variables():
    """Random variables, without the ones and zeros that norms start from."""
    drawn = jax.jit(MODEL.init)(jax.random.key(0), made_batches(1)[0]["image"])
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), drawn
    )


@pytest.fixture(scope="module", params=[False, True], ids=["eval", "train"])
def hessian(variables, request):
    return Hessian(MODEL, TASK, variables, made_batches(2), train=request.param)


@pytest.fixture(scope="module")
def dense(hessian):
    return hessian.dense()


def direction(hessian, like, seed=0):
    vector = np.random.default_rng(seed).normal(size=hessian.size).astype(np.float32)
    return ravel_pytree(like["params"])[1](jnp.asarray(vector)), vector


@pytest.fixture(scope="module")
def loss(variables):
    """The mean loss, computed in another way, at parameters in float64: `loss(weights, train)`."""
    _, unravel = ravel_pytree(variables["params"])

    @partial(jax.jit, static_argnums=1)
    def of(weights, train):
        given = {**variables, "params": unravel(weights)}
        total = 0
        for batch in made_batches(2):
            logits = MODEL.apply(given, batch["image"], train=train, mutable=["batch_stats"])[0]
            total -= jax.nn.log_softmax(logits)[np.arange(BATCH), batch["label"]].mean()
        return total / 2

    return of


def test_the_loss_is_that_of_the_network(hessian, variables, loss, request):
    train = "train" in request.node.callspec.id
    weights, _ = ravel_pytree(variables["params"])
    np.testing.assert_allclose(hessian.loss(), loss(weights, train), rtol=1e-5)
    assert hessian.size == weights.size < 2000


def test_products_are_those_of_reverse_mode_over_reverse_mode(hessian, variables, loss, request):
    train = "train" in request.node.callspec.id
    weights, _ = ravel_pytree(variables["params"])
    along, vector = direction(hessian, variables)

    @jax.jit
    @jax.grad
    def expected(weights):
        return jax.grad(loss)(weights, train) @ vector

    found, _ = ravel_pytree(hessian.product(along))
    assert np.linalg.norm(found - expected(weights)) < 1e-4 * np.linalg.norm(found)


def test_the_dense_hessian_is_symmetric_and_multiplies_as_the_products_do(
    hessian, dense, variables
):
    np.testing.assert_allclose(dense, dense.T, atol=1e-4 * np.abs(dense).max())
    along, vector = direction(hessian, variables)
    found, _ = ravel_pytree(hessian.product(along))
    np.testing.assert_allclose(found, dense @ vector, atol=1e-4 * np.abs(dense @ vector).max())


def test_eigenvalues_are_those_of_the_dense_hessian(hessian, dense):
    found = hessian.eigenvalues(jax.random.key(0), largest=3, smallest=2)
    exact = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(found.values, exact[[0, 1, 2, -2, -1]], rtol=0.01)
    for value, error, vector in zip(*found, strict=True):
        flat, _ = ravel_pytree(vector)
        assert np.linalg.norm(flat) == pytest.approx(1, rel=1e-3)
        rest = np.linalg.norm(dense @ flat - value * flat)
        assert rest <= error + 1e-3 * exact[0]


def test_the_largest_eigenvalue_is_that_of_power_iteration(hessian, variables):
    vector, _ = direction(hessian, variables, seed=1)
    for _ in range(100):
        flat, unravel = ravel_pytree(vector)
        vector = hessian.product(unravel(flat / jnp.linalg.norm(flat)))
    flat, _ = ravel_pytree(vector)
    found = hessian.eigenvalues(jax.random.key(0), largest=1, smallest=1).values
    assert np.abs(found).max() == pytest.approx(float(jnp.linalg.norm(flat)), rel=0.01)


def test_few_steps_have_large_errors(hessian, dense):
    rough = hessian.eigenvalues(jax.random.key(0), largest=1, smallest=0, steps=3)
    exact = np.linalg.eigvalsh(dense)
    assert np.abs(exact - rough.values).min() <= rough.errors[0]
    assert rough.errors[0] > 0.01 * exact[-1]


def test_the_density_is_that_of_the_dense_eigenvalues(hessian, dense):
    exact = np.linalg.eigvalsh(dense)
    density = hessian.spectral_density(jax.random.key(1), probes=8)
    np.testing.assert_allclose(density.weights.sum(-1), 1, rtol=1e-4)
    points, width = np.linspace(exact[0] * 1.5, exact[-1] * 1.5, 400), 0.1 * exact[-1]
    kernels = np.exp(-(((points[:, None] - exact) / width) ** 2) / 2) / (width * (2 * np.pi) ** 0.5)
    found, expected = density.smooth(points, width), kernels.mean(-1)
    spacing = points[1] - points[0]
    assert found.sum() * spacing == pytest.approx(1, abs=0.01)
    assert np.abs(found - expected).sum() * spacing < 0.1
    low = exact[0] / 4
    assert density.share_below(low) == pytest.approx((exact < low).mean(), abs=0.05)


def test_scanned_and_unrolled_networks_have_equal_eigenvalues(variables):
    whole = layout.unrolled(variables)
    given = {"unroll": whole, "scan": layout.scanned(whole)}
    found = [
        Hessian(MODEL.clone(loop=loop), TASK, given[loop], made_batches(1))
        .eigenvalues(jax.random.key(0))
        .values
        for loop in given
    ]
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_only_in_training_mode_the_scale_of_a_kernel_before_a_norm_has_no_effect(variables):
    along = jax.tree.map(jnp.zeros_like, variables["params"])
    along["stem"]["Conv_0"]["kernel"] = variables["params"]["stem"]["Conv_0"]["kernel"]

    def curvature(train):
        hessian = Hessian(MODEL, TASK, variables, made_batches(1), train)
        return jnp.vdot(*(ravel_pytree(each)[0] for each in (along, hessian.product(along))))

    assert abs(curvature(train=True)) < 1e-3 * abs(curvature(train=False))


def test_examples_of_weight_0_have_no_effect(variables):
    weights = np.ones((2, BATCH), np.float32)
    weights[1, 5:] = 0
    first, last = made_batches(2, weights)
    other = {**last, "image": np.where(weights[1, :, None, None, None], last["image"], 100)}
    cut = {name: array[:5] for name, array in last.items()}

    def loss(*batches, train):
        return Hessian(MODEL, TASK, variables, batches, train).loss()

    assert loss(first, last, train=False) == loss(first, other, train=False)
    assert loss(first, other, train=True) == loss(first, train=True)
    assert loss(other, train=True) == pytest.approx(loss(cut, train=True))


def test_no_example_is_an_error(variables):
    with pytest.raises(UserError, match="at least one batch"):
        Hessian(MODEL, TASK, variables, [])


def test_more_eigenvalues_than_steps_are_an_error(hessian):
    with pytest.raises(ValueError, match="6 eigenvalues need as many steps; set steps, now 4"):
        hessian.eigenvalues(jax.random.key(0), steps=4)

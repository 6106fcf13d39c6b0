"""A loss surface: its centre is the trained loss, and its directions have the weights' norms."""

import jax
import numpy as np
import pytest

from resjax.measurements import grid, loss_surface, random_direction
from resjax.models import layout


@pytest.fixture(scope="module")
def directions(run):
    return [random_direction(jax.random.key(seed), run.variables["params"]) for seed in (0, 1)]


@pytest.fixture(scope="module")
def surface(run, directions):
    batches = run.batches("train")
    return loss_surface(run.model, run.task, run.variables, batches, directions, grid(1, 3))


def test_the_centre_of_a_surface_is_the_trained_loss(run, surface):
    trained = run.evaluate(split="train")
    assert surface["loss"][4] == pytest.approx(trained["loss"], rel=1e-6)
    assert surface["error"][4] == trained["error"]
    assert len(set(surface["loss"])) == 9


def test_each_point_is_the_loss_of_the_moved_parameters(run, directions, surface):
    for index, (a, b) in enumerate(grid(1, 3)):
        if index in (1, 6):
            params = jax.tree.map(
                lambda w, d, e, a=a, b=b: w + a * d + b * e, run.variables["params"], *directions
            )
            moved = run.evaluate(run.variables | {"params": params}, split="train")
            assert surface["loss"][index] == pytest.approx(moved["loss"], rel=1e-5)


def test_points_evaluated_at_once_are_those_evaluated_alone(run, directions, surface):
    batches = run.batches("train")
    several = loss_surface(
        run.model, run.task, run.variables, batches, directions, grid(1, 3), at_once=4
    )
    np.testing.assert_allclose(several["loss"], surface["loss"], rtol=1e-5)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_each_filter_of_a_direction_has_the_norm_of_the_weights(network, loop):
    _, variables = network(depth=14)
    params = variables["params"]
    if loop == "unroll":
        params = layout.unrolled(variables)["params"]
    direction = random_direction(jax.random.key(0), params)
    names = {"scan": ("blocks", np.s_[0]), "unroll": ("block2", np.s_[:])}
    block, first = names[loop]
    for filters, weights in (
        (direction["stage2"][block]["Conv_0"], params["stage2"][block]["Conv_0"]),
        (direction["stem"]["Conv_0"], params["stem"]["Conv_0"]),
    ):
        own, other = filters["kernel"], weights["kernel"]
        if own.ndim == 5:
            own, other = own[first], other[first]
        norms = [np.linalg.norm(each.reshape(-1, each.shape[-1]), axis=0) for each in (own, other)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        cosine = np.vdot(own, other) / np.vdot(own, own)
        assert abs(cosine) < 0.5
    assert not direction["stage2"][block]["BatchNorm_0"]["scale"].any()
    assert not direction["stage2"][block]["BatchNorm_0"]["bias"].any()


def test_a_point_whose_loss_is_not_finite_is_nan(run, directions):
    batches = run.batches("test", 8)
    points = np.array([[0.0, 0.0], [np.nan, 0.0]])
    found = loss_surface(run.model, run.task, run.variables, batches, directions, points)
    assert np.isfinite(found["loss"]).tolist() == [True, False]
    assert np.isnan(found["error"][1])


def test_a_grid_has_the_origin_in_its_middle():
    assert grid(0.5, 3).tolist()[4] == [0, 0]
    assert grid(0.5, 3).tolist()[:2] == [[-0.5, -0.5], [-0.5, 0]]
    with pytest.raises(ValueError, match="a grid of 4 points has none in its middle; take 5"):
        grid(1, 4)

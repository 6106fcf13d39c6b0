"""Tests of my_task.py."""

import jax.numpy as jnp
from my_task import MyTask

from resjax.tasks import DatasetInfo
from resjax.tasks.conformance import check_task


def test_it_keeps_the_contract_of_a_task():
    check_task("my_task:MyTask")


def test_the_right_angles_have_no_loss():
    task = MyTask(DatasetInfo(class_names=tuple("abcd"), image_shape=(8, 8, 1)))
    vectors = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    assert abs(task.loss(vectors, {"label": jnp.array([0, 1])})) < 1e-6

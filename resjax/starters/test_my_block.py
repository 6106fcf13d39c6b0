"""Tests of my_block.py."""

import jax

import resjax
from resjax.models.conformance import check_block


def test_it_works_in_every_network():
    check_block("my_block:MyBlock")


def test_it_starts_as_its_shortcut():
    model = resjax.build("cifar_resnet8", block="my_block:MyBlock")
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = model.init(jax.random.key(1), images)
    features = model.apply(variables, images, method="features")
    assert (features["stage1"] == features["stem"]).all()

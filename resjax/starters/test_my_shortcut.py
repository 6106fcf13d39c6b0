"""Tests of my_shortcut.py."""

import jax

import resjax
from resjax.models.conformance import check_shortcut


def test_it_works_in_every_network():
    check_shortcut("my_shortcut:MyShortcut")


def test_it_starts_as_the_identity():
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))

    def logits(shortcut):
        model = resjax.build("cifar_resnet8", shortcut=shortcut)
        return model.apply(model.init(jax.random.key(1), images), images)

    assert (logits("my_shortcut:MyShortcut") == logits("pad")).all()

"""Fashion-MNIST with the recipe of Zhong et al.'s code for random erasing (arXiv 1708.04896).

    resjax data prepare fashion_mnist
    resjax train --config=configs/fashion_mnist.py --workdir=/tmp/fashion
    resjax train --config=configs/fashion_mnist.py:erasing --workdir=/tmp/erasing
    resjax sweep experiments/degradation.py --config=configs/fashion_mnist.py:small --workdir=/tmp/s

The default is ResNet-20 with shortcut B, trained for 300 epochs with batches of 128. The authors'
test error in %, mean and deviation over five runs, is 4.82 +- .04, and 4.45 +- .04 with random
erasing (zhunzhong07/Random-Erasing, issue 10). `degradation` trains plain and residual networks of
depths 20 to 110 for the 64,000 steps of He et al. 2015. None of these has been measured with resjax
yet. `small` is a version that takes an hour or two on two CPU cores, with narrow networks and
little more than an epoch. Its training error over the last 25 steps in %, mean and sample
standard deviation over three seeds: plain 22.55 +- 1.34 (20 layers), 51.47 +- 13.70 (56); residual
19.77 +- 1.08, 23.36 +- 3.47 (2026-11-23, commit 0067c6f).
"""

from ml_collections import ConfigDict

from resjax.config import default_config
from resjax.errors import UserError

EPOCH = 60_000 / 128  # steps


def get_config(variant: str = "recipe") -> ConfigDict:
    config = default_config()
    config.data.name = "fashion_mnist"
    config.data.batch_size = 128
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.depth = 20
    if variant in ("recipe", "erasing"):
        config.model.shortcut = "project"
        config.data.normalization = "channel"
        config.data.random_erasing = 0.5 if variant == "erasing" else 0.0
        config.train.steps = round(300 * EPOCH)
        config.train.log_every = 125
        config.train.eval_every = 1125
        config.train.checkpoint_every = 4500
        config.optimizer.weight_decay = 5e-4
    elif variant == "degradation":
        config.optimizer.schedule = "he2015"
        depths = (20, 32, 44, 56, 110)
        config.sweep = {"degradation": {"depths": depths, "seeds": (0, 1, 2)}}
    elif variant == "small":
        config.model.width = 8
        config.train.steps = 500
        config.train.log_every = 25
        config.train.eval_every = 250
        config.train.checkpoint_every = 0
        config.sweep = {"degradation": {"depths": (20, 56), "seeds": (0, 1, 2)}}
    else:
        raise UserError(f"unknown variant {variant!r}; known: recipe, erasing, degradation, small")
    return config

"""CIFAR-10 with the recipe of section 4.2 of He et al. 2015 (arXiv 1512.03385).

    resjax data prepare cifar10
    resjax train --config=configs/cifar10.py --config.model.depth=56 --workdir=/tmp/cifar10
    resjax sweep experiments/degradation.py --config=configs/cifar10.py --workdir=/tmp/sweep

Published test error of residual networks in % (the paper's table 6): depth 20 8.75, 32 7.51, 44
7.17, 56 6.97, 110 6.61 +- 0.16 over five runs. Plain networks, in a replication with five runs
(nabla0001/resnet): depth 20 9.78 +- 0.13, 56 12.95 +- 0.22. Errors and times have not been measured
with resjax yet.
"""

from ml_collections import ConfigDict

from resjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.family = "cifar"
    config.model.shortcut = "pad"
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.normalization = "pixel_mean"
    config.data.crop_padding = 4
    config.data.flip = True
    config.train.steps = 64_000
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "he2015"
    config.optimizer.boundaries = (0.5, 0.75)
    config.optimizer.weight_decay = 1e-4
    return config

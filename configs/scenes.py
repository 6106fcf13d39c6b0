"""Semantic segmentation of handwritten digits on textured backgrounds.

resjax train --config=configs/scenes.py --workdir=/tmp/scenes
"""

from ml_collections import ConfigDict

from resjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.task.name = "segmentation"
    config.model.width = 8
    config.data.name = "scenes"
    config.data.batch_size = 32
    config.data.crop_padding = 4
    config.train.steps = 1000
    config.train.log_every = 25
    config.train.eval_every = 250
    config.train.checkpoint_every = 0
    return config

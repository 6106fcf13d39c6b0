"""Segmentation and detection of handwritten digits on textured backgrounds.

    resjax train --config=configs/scenes.py --workdir=/tmp/segmentation
    resjax train --config=configs/scenes.py:detection --workdir=/tmp/detection

The data are part of the installation, so no network is needed.
"""

from ml_collections import ConfigDict

from resjax.config import default_config
from resjax.errors import UserError


def get_config(task: str = "segmentation") -> ConfigDict:
    config = default_config()
    config.model.width = 8
    config.data.name = "scenes"
    config.data.batch_size = 32
    config.train.log_every = 25
    config.train.eval_every = 200
    config.train.checkpoint_every = 0
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.task.name = task
    if task == "segmentation":
        config.train.steps = 2000
        config.data.crop_padding = 4
        config.optimizer.learning_rate = 0.01
    elif task == "detection":
        config.train.steps = 600
        config.optimizer.learning_rate = 0.005
        # Without group norm, a head of 32 channels finds nothing in 900 steps.
        config.task.options = {"channels": 32, "stages": 1, "group_norm": True}
    else:
        raise UserError(f"unknown task {task!r}; known: segmentation, detection")
    return config

"""ResNet-50 on ImageNet, by the paper's recipe or by today's plain one.

    resjax train --config=configs/imagenet.py --workdir=/tmp/imagenet
    resjax train --config=configs/imagenet.py:v1.5 --workdir=/tmp/imagenet

ImageNet has to be prepared as TFDS does it, in the format array_record (`resjax data list` looks).

`paper` is section 3.4 of He et al. 2015 (arXiv 1512.03385): batches of 256, 600,000 iterations, the
rate divided by ten when the error plateaus, here twice at even distances; random crops of images
scaled to a shorter side of 256 to 480 pixels, AlexNet's shift of colours, the mean image
subtracted, ten crops in the test; bottlenecks stride in their first 1x1. `v1.5` strides in the 3x3
and trains 90 epochs on crops of random area and ratio, the rate divided by ten every 30.

Expected top-1 error: 22.85 % with ten crops for `paper` (table 3), 23.87 % with one crop for `v1.5`
(torchvision's V1 weights). Neither has been measured with resjax yet, nor has a run's time.
"""

from ml_collections import ConfigDict

from resjax.config import default_config

EPOCH = 1_281_167 // 256  # steps
RECIPES = {
    "paper": ("resnet50_v1", 600_000),
    "v1.5": ("resnet50", 90 * EPOCH),
}


def get_config(recipe: str = "paper") -> ConfigDict:
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    config = default_config()
    config.model.name, config.train.steps = RECIPES[recipe]
    config.data.name = "imagenet2012"
    config.data.batch_size = 256
    config.data.flip = True
    config.data.image_size = 224
    if recipe == "paper":
        config.data.train_crop = "scale_jitter"
        config.data.eval_crop = "ten"
        config.data.pca_lighting = 0.1
        config.data.normalization = "pixel_mean"
    else:
        config.data.train_crop = "random_resized"
        config.data.normalization = "channel"
    config.train.eval_every = 5_000  # about an epoch
    config.train.checkpoint_every = 5_000
    config.optimizer.boundaries = (1 / 3, 2 / 3)
    return config

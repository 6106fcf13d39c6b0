"""ResNet-50 on ImageNet with the recipe of He et al. 2015 or the plain recipe of today.

    resjax train --config=configs/imagenet.py --workdir=/tmp/imagenet
    resjax train --config=configs/imagenet.py:v1.5 --workdir=/tmp/imagenet

ImageNet must have been prepared by TFDS in the format array_record; `resjax data list` shows
whether it is found.

`paper` is section 3.4 of He et al. 2015 (arXiv 1512.03385): batches of 256, 600,000 steps, and a
learning rate divided by ten when the error plateaus, here twice at equal distances. Images are
scaled to a shorter side of 256 to 480 pixels and randomly cropped, with AlexNet's shift of colors
and the mean image subtracted; evaluation averages ten crops. Bottlenecks stride in the first 1x1
convolution. `v1.5` strides in the 3x3 convolution and trains for 90 epochs on crops of random area
and aspect ratio, with the learning rate divided by ten every 30 epochs.

Published top-1 error: 22.85 % with ten crops for `paper` (table 3), 23.87 % with one crop for
`v1.5` (torchvision's V1 weights). Errors and times have not been measured with resjax yet.
"""

from ml_collections import ConfigDict

from resjax.config import default_config
from resjax.errors import UserError

STEPS_PER_EPOCH = 1_281_167 // 256
RECIPES = {
    "paper": ("resnet50_v1", 600_000),
    "v1.5": ("resnet50", 90 * STEPS_PER_EPOCH),
}


def get_config(recipe: str = "paper") -> ConfigDict:
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
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

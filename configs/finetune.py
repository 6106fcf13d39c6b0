"""Fine-tuning of pretrained weights on a small dataset, in several variants.

    resjax import resnet50.safetensors --out=weights/resnet50
    resjax train --config=configs/finetune.py --config.transfer.weights=weights/resnet50 \\
        --config.data.name=folder:photos --workdir=/tmp/finetune

The variant follows a colon, as in `--config=configs/finetune.py:gradual`:

- `finetune`: a new head, and all layers train. The learning rate of each stage is half that of the
  next stage; it rises in the first steps and then follows a cosine.
- `frozen`: only the head trains, on frozen features.
- `gradual`: the head trains from the start, stage 4 from epoch 2, stage 3 from epoch 4, and the
  other layers from epoch 6.
- `bit,EXAMPLES,SIDE`: the BiT-HyperRule of Kolesnikov et al. 2020 (arXiv 1912.11370) for a number
  of training images and their side in pixels: `bit,3680,224`. The numbers are those of the authors'
  code (google-research/big_transfer, bit_hyperrule.py). That code scales images to 160 (512) pixels
  and crops them at random to 128 (480); here a crop may have a border of zeros instead.

The stages are those of ImageNet networks; CIFAR networks have no stage 4. `frozen` should be better
than chance within an epoch, and `finetune` and `gradual` better than `frozen` at the end. Published
accuracy for `bit` with BiT-M-R50x1 on CIFAR-10's test set in %: 54.1 with one example per class,
82.4 with five, 97.3 with all. Accuracies and times have not been measured with resjax yet.
"""

from ml_collections import ConfigDict

from resjax.config import default_config
from resjax.errors import UserError


def get_config(variant: str = "finetune") -> ConfigDict:
    config = default_config()
    config.data.name = "oxford_iiit_pet"
    config.data.normalization = "weights"
    config.data.flip = True
    config.transfer.head = "new"
    rule, *numbers = variant.split(",")
    if rule == "bit":
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise UserError(
                f"unknown variant {variant!r}; write bit,EXAMPLES,SIDE, for example bit,3680,224"
            )
        bit_hyperrule(config, *map(int, numbers))
        return config
    config.data.image_size = 224
    config.data.train_crop = "random_resized"
    config.data.batch_size = 64
    config.train.steps = 1000
    config.train.log_every = 50
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    if variant == "finetune":
        config.transfer.layer_decay = 0.5
    elif variant == "frozen":
        config.transfer.freeze = "*"
        config.transfer.thaw = {"head": 0}
    elif variant == "gradual":
        config.transfer.thaw = {"head": 0, "stage4": 2, "stage3": 4, "*": 6}
    else:
        raise UserError(
            f"unknown variant {variant!r}; known: finetune, frozen, gradual, bit,EXAMPLES,SIDE"
        )
    return config


# For fewer training images than in the first column: steps, warm-up steps, steps of decays by ten.
BIT_SCHEDULES = (
    (20_000, 500, 100, (200, 300, 400)),
    (500_000, 10_000, 500, (3_000, 6_000, 9_000)),
    (float("inf"), 20_000, 500, (6_000, 12_000, 18_000)),
)


def bit_hyperrule(config: ConfigDict, examples: int, side: int) -> None:
    _, steps, warmup, decays = next(row for row in BIT_SCHEDULES if examples < row[0])
    config.data.image_size = 128 if side < 96 else 480
    config.data.crop_padding = 16
    config.data.batch_size = 512
    config.data.mixup = 0.1 if examples >= 20_000 else 0.0
    config.train.steps = steps
    config.train.log_every = 50
    config.train.eval_every = steps // 5
    config.train.checkpoint_every = steps // 5
    config.optimizer.learning_rate = 0.003
    config.optimizer.schedule = "steps"
    config.optimizer.warmup_steps = warmup
    config.optimizer.boundaries = tuple(step / steps for step in decays)
    config.optimizer.weight_decay = 0.0
    config.transfer.head = "zero"

"""The usual steps from pretrained weights to a small data set of one's own.

    resjax import resnet50.safetensors --out=weights/resnet50
    resjax train --config=configs/finetune.py --config.transfer.weights=weights/resnet50 \\
        --config.data.name=folder:photos --workdir=/tmp/finetune

What follows a colon, as in `--config=configs/finetune.py:gradual`, is one of

- `finetune`: a new head, all layers train, each stage nearer to the images at half the rate of the
  next, which rises over the first steps and then falls with a cosine.
- `frozen`: the head alone trains, on features that stay as they are.
- `gradual`: the head first, stage 4 from epoch 2, stage 3 from epoch 4, and the rest from epoch 6.
- `bit,EXAMPLES,SIDE`: the BiT-HyperRule of Kolesnikov et al. 2020 (arXiv 1912.11370), which follows
  from the number of training images and their side in pixels: `bit,3680,224`. The numbers are those
  of the authors' code (google-research/big_transfer, bit_hyperrule.py). There images are scaled to
  160 (512) pixels and cropped at random to 128 (480); here a crop's border may be zeros instead.

The stages that are named here are those of ImageNet's networks; CIFAR's have no stage 4. Expect
`frozen` above chance within an epoch, and `finetune` and `gradual` above `frozen` at the end.
Published for `bit` with BiT-M-R50x1, in % of CIFAR-10's test set that is right: 54.1 with one
example a class, 82.4 with five, 97.3 with all. None of it has been measured with resjax yet, nor
has a run's time.
"""

from ml_collections import ConfigDict

from resjax.config import default_config
from resjax.errors import UserError


def get_config(what: str = "finetune") -> ConfigDict:
    config = default_config()
    config.data.name = "oxford_iiit_pet"
    config.data.normalization = "weights"
    config.data.flip = True
    config.transfer.head = "new"
    rule, *numbers = what.split(",")
    if rule == "bit":
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise UserError(f"{what}: say bit,EXAMPLES,SIDE, such as bit,3680,224")
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
    if what == "finetune":
        config.transfer.layer_decay = 0.5
    elif what == "frozen":
        config.transfer.freeze = "*"
        config.transfer.thaw = {"head": 0}
    elif what == "gradual":
        config.transfer.thaw = {"head": 0, "stage4": 2, "stage3": 4, "*": 6}
    else:
        raise UserError(f"{what}: finetune, frozen, gradual or bit,EXAMPLES,SIDE")
    return config


# Training images below which a row counts; steps, those of the warm-up and of the decays by ten.
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

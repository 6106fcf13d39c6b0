"""The schema of a config: every field with its type, bounds, default and meaning.

The string below a field is its documentation, which `resjax config` prints. A field named
`...options` holds further keyword arguments of what the field beside it names.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from resjax.config.fields import Bounds, Field, fields
from resjax.errors import UserError
from resjax.run_files import RENAMED_FIELDS

Positive = Annotated[int, Bounds(ge=1)]
NonNegative = Annotated[int, Bounds(ge=0)]
Fraction = Annotated[float, Bounds(ge=0, lt=1)]
Strength = Annotated[float, Bounds(ge=0)]
Factor = Annotated[float, Bounds(gt=0)]


@dataclass(frozen=True)
class Model:
    """The network. None means the value of the architecture `name`, or else of the family."""

    name: str | None = None
    """A published architecture, such as cifar_resnet56; the other fields change it."""
    family: str | None = None
    """The layout of stages and depths: cifar, wide or imagenet."""
    depth: Annotated[int, Bounds(ge=1, le=10_000)] | None = None
    """Weight layers as the papers count them: 6n + 2 for CIFAR networks of basic blocks."""
    block: str | None = None
    """A block by name, such as basic, bottleneck, preact_basic or fixup_basic, or your own class as
    package.module:Class."""
    block_options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the block's class."""
    shortcut: str | None = None
    """none (a plain network), pad (option A), project (B), project_all (C), ..., or your own class
    as package.module:Class."""
    shortcut_options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the shortcut's class."""
    width: Positive | None = None
    """Filters of the first stage; every later stage doubles them."""
    widen: Positive | None = None
    """Factor on the width of every stage."""
    stem: str | None = None
    """The layers before the first stage: cifar, imagenet, deep (ResNet-D) or bit."""
    stem_pool: str | None = None
    """Pooling after the stem: max, average, blur or none. Defaults to none for the stem cifar, else
    to max."""
    dilated_stages: NonNegative | None = None
    """Number of final stages that dilate their convolutions instead of striding, as segmentation
    backbones do."""
    norm: str | None = None
    """batch or group; none puts a bias per channel in the place of every norm, fixup one number for
    all channels, as in Fixup, whose blocks are fixup_basic and fixup_bottleneck."""
    standardize: bool | None = None
    """Normalize every convolution filter to mean 0 and variance 1."""
    loop: Literal["auto", "unroll", "scan"] = "auto"
    """Compile a stage's equal blocks one after the other, or as one scanned block. The network is
    the same; scanning keeps the compile time of deep networks short. auto scans
    networks of more than 100 blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and BN statistics are always float32."""
    zero_init_residual: bool = False
    """Initialize the scale of every branch's last BN to zero, so that a block is its shortcut."""
    stochastic_depth: Fraction = 0.0
    """Probability of dropping the last block's branch; it grows linearly with a block's index."""
    branch_scale: Any = 1.0
    """Factor of the branch of each block: a number, a power of the number of blocks (L^-0.5, 1/L),
    one number per block (1,0.5,0.5), or learned: one parameter per block that starts at 0, as in
    ReZero and, with norm none, SkipInit. learned:0.2 and learned:L^-0.5 start at other values."""
    bn_momentum: Fraction = 0.9
    """Weight of the old value in each update of the running statistics; PyTorch's 0.1 is 0.9."""
    bn_epsilon: Strength | None = None
    """Epsilon of the normalization layers; None means 1e-5."""
    bn_unbiased: bool | None = None
    """Running variances follow the unbiased variance of each batch, as in PyTorch, or the biased
    one, as in Flax. None means as in the weights, which are PyTorch's unless Keras made them, and
    biased without weights."""
    remat: bool = False
    """Store only the convolutions' outputs for the backward pass and recompute the rest."""


@dataclass(frozen=True)
class Data:
    """The dataset, its batches, and the augmentation of training images."""

    name: str = "digits"
    """A dataset by name, or your own: tfds:NAME, folder:PATH, npz:PATH, masks:PATH, coco:PATH."""
    train_split: str | None = None
    """TFDS expression for the training split, such as train[:90%]; None means the dataset's own."""
    test_split: str | None = None
    """TFDS expression for the test split; None means the dataset's own."""
    classes: Annotated[tuple[int | str, ...], Bounds(ge=0)] = ()
    """Classes to keep in both splits, such as cat,dog, which become 0,1; empty keeps all. A number
    is an index from 0, or a name if any class of the dataset is named by a number."""
    per_class: Positive | None = None
    """Training examples to draw from each class; None keeps all."""
    subset_seed: NonNegative = 0
    """Seed of the draw by per_class; for one seed, a larger draw contains a smaller one."""
    batch_size: Positive = 128
    """Images per step, over all devices together; at most those of the training split."""
    eval_batch_size: Positive = 256
    """Images per evaluation step; changes its speed only."""
    feed: Literal["auto", "device", "stream"] = "auto"
    """device: the dataset lies in device memory. stream: the host reads and decodes batches ahead.
    auto: device if the dataset fits into a quarter of the devices' memory."""
    workers: Annotated[int, Bounds(ge=0, le=1024)] | None = None
    """Decoding processes per host for a stream; 0 decodes in a thread, None is one per core."""
    image_size: Positive | None = None
    """Side in pixels to which images are resized; None leaves them as they are."""
    on_bad_image: Literal["error", "skip"] = "error"
    """End the run at an image that cannot be decoded, or skip and count it."""
    train_crop: Literal["none", "random_resized", "scale_jitter", "large_scale_jitter"] = "none"
    """How a stream crops training images to image_size. none: as for evaluation. random_resized:
    8 to 100 % of the area (Szegedy et al. 2014). scale_jitter: a crop of the image at a random
    scale (He et al. 2015). large_scale_jitter: the image at a tenth to twice the size, cropped or
    padded (Ghiasi et al. 2021)."""
    eval_crop: Literal["center", "whole", "ten"] = "center"
    """Evaluate the center of an image, the whole image with padding, or the mean over ten crops."""
    crop_padding: NonNegative = 0
    """Pixels of zeros around a training image before a random crop; 0 does not crop."""
    flip: bool = False
    """Mirror training images at random."""
    color_jitter: Annotated[tuple[float, ...], Bounds(ge=0)] = ()
    """Strengths of random changes of brightness, contrast and saturation, such as 0.4,0.4,0.4."""
    pca_lighting: Strength = 0.0
    """Standard deviation of a random shift along the principal axes of all colors; AlexNet's is
    0.1."""
    trivial_augment: bool = False
    """Apply one operation of TrivialAugment (wide) to every training image."""
    cutout: NonNegative = 0
    """Side in pixels of a square of zeros at a random place of every training image. An odd side is
    exact; the code of DeVries & Taylor 2017 makes it one pixel smaller."""
    random_erasing: Annotated[float, Bounds(ge=0, le=1)] = 0.0
    """Probability of erasing a random rectangle of a training image."""
    mixup: Strength = 0.0
    """Average pairs of training images with weights from Beta(mixup, mixup); 0 turns it off."""
    cutmix: Strength = 0.0
    """Paste boxes between training images, with areas from Beta(cutmix, cutmix); 0 turns it off.
    With mixup on too, each batch uses either with probability 1/2."""
    normalization: Literal["pixel_mean", "channel", "weights"] = "pixel_mean"
    """Subtract the mean image, standardize every channel, or do as the pretrained weights did."""


@dataclass(frozen=True)
class Task:
    """The task: the predictions of the network and their scores."""

    name: str = "classification"
    """classification, or your own class as package.module:Class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the task's class, such as label_smoothing of classification."""


@dataclass(frozen=True)
class Train:
    """The training run. Its intervals are in steps."""

    steps: Positive = 64_000
    """Steps of the whole run."""
    log_every: Positive = 100
    """Steps between two lines of training metrics, which are means over these steps, in training
    mode, on images as the config augments them. The device runs them at once, or in parts of a few
    seconds."""
    eval_every: Positive = 400
    """Steps between two evaluations on the test split, a multiple of log_every."""
    evaluate_train: bool = False
    """Evaluate on the whole training split too, in evaluation mode without augmentation: lines of
    the split train_set, beside the means over steps of the split train. An evaluation of as many
    images as the steps before it took costs about a third of these steps."""
    checkpoint_every: NonNegative = 4000
    """Steps between two checkpoints, a multiple of log_every; 0 saves only the last step."""
    nonfinite: Literal["stop", "skip", "record"] = "stop"
    """When the loss is not finite. stop: end the run and locate the first nonfinite value. skip:
    leave out the step, also if only a gradient is not finite. record: write null and continue.
    stop and skip end the run if a parameter or a sum of test metrics is not finite."""
    accumulation_steps: Positive = 1
    """Parts of a batch whose gradients are computed one after the other and averaged, to save
    memory. Each part has its own BN statistics."""


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and the learning-rate schedule."""

    name: str = "sgd"
    """sgd, lars, lamb, adamw, another optimizer of Optax by name (adafactor, lion, ...), or your
    own as package.module:function, called as function(learning_rate, **options)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the optimizer."""
    learning_rate: Factor = 0.1
    """The rate after the warm-up and before the first decay."""
    momentum: Fraction = 0.9
    """Decay rate of the first moment; no schedule changes it."""
    nesterov: bool = False
    """Use Nesterov momentum. adamw is then NAdamW as in timm; for Optax's, use the name nadamw."""
    beta2: Fraction = 0.999
    """Decay rate of the second moment, in lamb and adamw."""
    weight_decay: Strength = 1e-4
    """Factor of the L2 penalty's gradient."""
    weight_decay_on: Literal["all", "kernels"] = "all"
    """Decay all parameters, those of BN too, as He et al. do, or kernels only."""
    schedule: str = "steps"
    """steps: decay at the boundaries. constant: never. cosine: to zero. onecycle: up from a 25th
    and down to almost nothing (Smith & Topin 2018), as in PyTorch. he2015: steps, and from depth
    110 on a tenth of the rate until the training error is below 80 %. Or your own as
    package.module:function, called as function(learning_rate, steps, **schedule_options); it
    returns an Optax schedule."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of your own schedule."""
    boundaries: Annotated[tuple[float, ...], Bounds(gt=0, lt=1)] = (0.5, 0.75)
    """Steps at which the rate decays, as fractions of train.steps."""
    clip_norm: Strength = 0.0
    """Largest global norm of the gradient; 0 does not clip."""
    ema_decay: Fraction = 0.0
    """Decay rate of the weights' exponential moving average; 0 keeps no average."""
    decay_factor: Factor = 0.1
    """Factor on the rate at every boundary."""
    warmup_steps: NonNegative = 0
    """Steps in which the rate rises linearly from zero."""


@dataclass(frozen=True)
class Transfer:
    """Initial weights, and which parameters train, from when on, and at which rate.

    A pattern is a module (`stage4`, `stage4/block1`) or the path of a parameter in the unrolled
    network (`stage4/block1/Conv_0/kernel`); both may contain `*`, `?` and `[...]`.
    """

    weights: str | None = None
    """A weights folder, which `resjax import` makes, or a run folder, for its last checkpoint."""
    head: Literal["keep", "new", "zero"] = "keep"
    """Keep the weights' head, initialize a new one for other classes, or a new one with a zero
    kernel."""
    freeze: str = ""
    """Patterns of parameters that never train, separated by commas."""
    thaw: Annotated[dict[str, float], Bounds(ge=0)] = field(default_factory=dict)
    """Maps a pattern to the epoch from which its parameters train, also if `freeze` matches them.
    The longest pattern that matches a parameter wins; of equally long ones, the last."""
    frozen_norm: Literal["eval", "train"] = "eval"
    """BN layers that do not train use their running statistics, or go on with those of batches."""
    layer_decay: Factor = 1.0
    """Each stage trains at this factor times the rate of the next one, and the head at
    optimizer.learning_rate; timm's layer decay."""
    first_rate: Factor | None = None
    """The stem's rate; rates of the stages rise from it to the head's by equal factors."""


@dataclass(frozen=True)
class Diagnostics:
    """Measurements inside a training step, one value per layer, for layers.jsonl."""

    every: NonNegative = 0
    """Steps between two measurements, a multiple of train.log_every; 0 measures nothing."""
    names: tuple[str, ...] = ("gradient_norm", "activation_gradient_norm")
    """Diagnostics by name, `all` of them, or your own as package.module:function."""
    layers: str = ""
    """Patterns of the layers to record, such as `stage1,*/BatchNorm_0`; empty for all layers."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of each diagnostic, by its name."""


@dataclass(frozen=True)
class Parallel:
    """How training is spread over the devices."""

    backend: Literal["jit", "pmap"] = "jit"
    """Sharded jit, or pmap; both train the same."""
    shard_parameters: Positive = 1
    """Devices that share one copy of parameters and optimizer state (FSDP); jit only."""
    bn_devices: NonNegative = 0
    """Devices that compute BN statistics together; 0 means all of them."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run; `sweep` holds keywords of the sweep() of experiments."""

    seed: Annotated[int, Bounds(ge=0, lt=2**31)] = 0
    """Seed of initialization, order and augmentation."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    transfer: Transfer = field(default_factory=Transfer)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    parallel: Parallel = field(default_factory=Parallel)
    track: str = field(default="", compare=False)
    """A tracker that follows the run: tensorboard, wandb, or your own as package.module:Name; empty
    for none. It is not part of a run's identity."""
    sweep: dict[str, Any] = field(default_factory=dict, compare=False)
    """Keywords of the sweep() of experiments, below an experiment's name for that one only:
    {'degradation': {'depths': (8, 20)}}. They choose the runs and are not part of a run's
    identity."""


FIELDS = dict(fields(Config))
"""Every field by its dotted path, such as model.depth."""
SECTIONS = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}


def find_field(path: str) -> Field:
    """Returns the field at a dotted path; below a dict, any name is a field that holds anything.

    Raises:
      UserError: there is no such field; the message names the nearest one.
    """
    if path in SECTIONS:
        names = ", ".join(each.name for each in dataclasses.fields(SECTIONS[path]))
        raise UserError(f"{path} is a section; set one of its fields: {names}")
    for parent in itertools.accumulate(path.split("."), "{}.{}".format):
        found = FIELDS.get(parent)
        if found and parent == path:
            return found
        if found and found.type is dict:
            return found.of_item
        if found:
            raise UserError(f"{path}: {parent} holds {found}, it has no fields")
    raise UserError(no_such_field(path))


def no_such_field(path: str) -> str:
    """Returns a message that names the field that is meant, or all sections."""
    meant = meant_field(path)
    hint = f"did you mean {meant}?" if meant else f"the sections are {', '.join(SECTIONS)}"
    return f"{path}: no such field; {hint}"


def meant_field(path: str) -> str | None:
    """Returns the field of this path or name, now or earlier, or the nearest one; None for none."""
    dicts = tuple(f"{field}." for field, kind in FIELDS.items() if kind.type is dict)
    if path in FIELDS or path.startswith(dicts):
        return path
    if path in SECTIONS:
        return f"{path}.{dataclasses.fields(SECTIONS[path])[0].name}"
    name = path.rpartition(".")[2]
    now = RENAMED_FIELDS | {field: field for field in reversed(FIELDS)}
    by_name = {field.rpartition(".")[2]: meant for field, meant in now.items()}
    near = difflib.get_close_matches(path, FIELDS)
    near += [by_name[other] for other in difflib.get_close_matches(name, by_name)]
    return by_name.get(name, *near[:1])

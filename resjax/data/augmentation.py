"""Augmentation on the device: pure functions of keys and a batch.

Each image has its own key, so its draws do not depend on how a batch is divided among devices.
Draws for a whole batch (how two images mix) use one key that all devices share.
"""

import enum
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from resjax.data.examples import VOID
from resjax.data.normalization import Statistics, scale, standardize
from resjax.data.trivial_augment import GRAY, trivial_augment
from resjax.errors import UserError
from resjax.xla.target import platform

Images = Float[Array, "n h w c"]
Batch = dict[str, Array]
ERASED_AREA = (0.02, 0.33)  # bounds, as a fraction of the image's area (Zhong et al. 2017)
ERASED_RATIO = (0.3, 3.3)  # bounds of height / width
ERASING_TRIES = 10  # draws until a rectangle fits into the image, as in torchvision


class Augmentation(NamedTuple):
    """Which augmentations are applied and how strongly; the fields of `config.data`, all off."""

    crop_padding: int = 0
    flip: bool = False
    color_jitter: tuple[float, ...] = ()
    pca_lighting: float = 0.0
    trivial_augment: bool = False
    cutout: int = 0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def from_config(cls, data: Any, image_shape: Sequence[int]) -> Self:
        """Returns the augmentation of images (h, w, c) that a config's section `data` describes.

        Raises:
          UserError: it would leave nothing of an image.
        """
        side = min(image_shape[:2])
        for name, most in (("crop_padding", side - 1), ("cutout", side)):
            if (pixels := getattr(data, name)) > most:
                raise UserError(
                    f"data.{name}={pixels}: must be at most {most} for images of {side} pixels"
                )
        return cls(*(getattr(data, name) for name in cls._fields))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@enum.unique
class Draw(enum.IntEnum):
    """Numbers of the random draws for an image; adding an augmentation changes no other's draws."""

    CROP = 0
    FLIP = 1
    TRIVIAL = 2
    JITTER = 3
    LIGHTING = 4
    CUTOUT = 5
    ERASING = 6


def augment(
    keys: Key[Array, "n"],
    batch_key: Key[Array, ""],
    batch: Batch,
    statistics: Statistics,
    augmentation: Augmentation,
) -> Batch:
    """Augments and normalizes the images of a batch, and mixes images and targets in pairs.

    Operations on bytes come first, then those on colors in [0, 1], then normalization, so that
    the zeros of padding, cutout and erasing are the mean image. Masks and boxes move with their
    images. Mixing comes last and applies the same share to every floating-point entry. All other
    entries are returned unchanged.

    Args:
      keys: one for each image.
      batch_key: the same on every device; used by mixing.
      batch: `image` as uint8 (n, h, w, c). With mixing, n is even, and `label` holds probabilities
        (n, classes) or regression targets (n, ...) in floating point. A `mask` (n, h, w) holds
        classes, `boxes` (n, objects, 4) left, top, right and bottom in pixels, `classes` (n,
        objects) the class of each box, 0 for none.
      statistics: of the dataset; `pca_lighting` needs its `color_axes`.
      augmentation: what to apply.

    Returns:
      The batch with `image` in float32.

    Raises:
      ValueError: mixup or cutmix is on and `label` holds integers.
    """

    def draw(number: Draw) -> Key[Array, "n"]:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)

    images = batch["image"]
    if augmentation.trivial_augment:
        images = trivial_augment(draw(Draw.TRIVIAL), images)
    images = scale(images)
    if augmentation.color_jitter:
        images = color_jitter(draw(Draw.JITTER), images, augmentation.color_jitter)
    if augmentation.pca_lighting:
        assert statistics.color_axes is not None
        axes, deviation = statistics.color_axes, augmentation.pca_lighting
        images = pca_lighting(draw(Draw.LIGHTING), images, axes, deviation)
    images = standardize(images, statistics)
    batch = {**batch, "image": images}
    if augmentation.crop_padding:
        batch = pad_crop(draw(Draw.CROP), batch, augmentation.crop_padding)
    if augmentation.flip:
        batch = flip(draw(Draw.FLIP), batch)
    images = batch["image"]
    if augmentation.cutout:
        images = cutout(draw(Draw.CUTOUT), images, augmentation.cutout)
    if augmentation.random_erasing:
        images = random_erasing(draw(Draw.ERASING), images, augmentation.random_erasing)
    batch = {**batch, "image": images}
    if augmentation.mixes:
        batch = mix(batch_key, batch, augmentation.mixup, augmentation.cutmix)
    return batch


def pad_crop(keys: Key[Array, "n"], batch: Batch, padding: int) -> Batch:
    """Pads each side with zeros and crops a random window of the original size (He et al. 2015).

    Args:
      keys: one for each image.
      batch: `image` is normalized, so that zeros are the mean image. The padding of a `mask` is
        void. Boxes are cut at the window; a box outside the window gets the class 0.
      padding: pixels on each side.
    """

    def window(images: Array, fill: int) -> Array:
        sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        return cut_windows(corners, jnp.pad(images, sides, constant_values=fill), images.shape[1:])

    corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))(keys)
    cropped = {**batch, "image": window(batch["image"], 0)}
    if "mask" in batch:
        cropped["mask"] = window(batch["mask"][..., None], VOID)[..., 0]
    if "boxes" in batch:
        moved = batch["boxes"] + jnp.tile(padding - corners[:, None, ::-1], 2)
        height, width = batch["image"].shape[1:3]
        boxes = jnp.clip(moved, 0, jnp.asarray([width, height] * 2, moved.dtype))
        left = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        cropped |= {"boxes": boxes, "classes": jnp.where(left, batch["classes"], 0)}
    return cropped


def cut_windows(
    corners: Int[Array, "n 2"], images: Array, shape: tuple[int, ...]
) -> Shaped[Array, "n h w c"]:
    """Cuts a window of `shape`, (h, w, c), out of each image, at its own row and column.

    Problem: a TPU cuts such windows image by image. Effect of products with matrices of zeros and
    ones: all are cut at once, with the same values, unless an image has values that are not finite.
    For 32 images of 32 pixels on a v5e, 16 instead of 179 us are predicted.
    """
    if platform() != "tpu":
        cut_one = partial(lax.dynamic_slice, slice_sizes=shape)
        return jax.vmap(lambda corner, image: cut_one(image, (*corner, 0)))(corners, images)
    exact = jnp.promote_types(images.dtype, jnp.float32)
    rows, columns = (
        jnp.arange(size)[:, None] + corner[:, None, None] == jnp.arange(whole)
        for size, corner, whole in zip(shape[:2], corners.T, images.shape[1:3], strict=True)
    )
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    cut_rows = product("nij,njwc->niwc", rows.astype(exact), images.astype(exact))
    windows = product("nij,nhjc->nhic", columns.astype(exact), cut_rows)
    return windows.astype(images.dtype)


def flip(keys: Key[Array, "n"], batch: Batch) -> Batch:
    """Mirrors each image left to right with probability 1/2, with its mask and boxes."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)

    def chosen(changed: Array, array: Array) -> Array:
        return jnp.where(mirrored.reshape(-1, *[1] * (array.ndim - 1)), changed, array)

    images = batch["image"]
    flipped = {**batch, "image": chosen(images[:, :, ::-1], images)}
    if "mask" in batch:
        flipped["mask"] = chosen(batch["mask"][:, :, ::-1], batch["mask"])
    if "boxes" in batch:
        left, top, right, bottom = jnp.moveaxis(batch["boxes"], -1, 0)
        width = images.shape[2]
        changed = jnp.stack([width - right, top, width - left, bottom], -1)
        flipped["boxes"] = chosen(changed, batch["boxes"])
    return flipped


def color_jitter(keys: Key[Array, "n"], images: Images, strengths: tuple[float, ...]) -> Images:
    """Changes brightness, contrast and saturation in random order, as torchvision's ColorJitter.

    Args:
      keys: one for each image; draw the factors and their order.
      images: in [0, 1], with 1 or 3 channels.
      strengths: of brightness, contrast and saturation; each factor is uniform between
        `max(0, 1 - strength)` and `1 + strength`.
    """

    def jitter(key: Array, image: Array) -> Array:
        return adjust_colors(image, *random_color_factors(key, strengths))

    return jax.vmap(jitter)(keys, images)


def random_color_factors(
    key: Key[Array, ""], strengths: tuple[float, ...]
) -> tuple[Float[Array, "3"], Int[Array, "3"]]:
    """Draws the factors of `color_jitter` and the order in which they apply."""
    factor_key, order_key = jax.random.split(key)
    reach = jnp.asarray(strengths)
    least = jnp.maximum(1 - reach, 0)
    factors = jax.random.uniform(factor_key, reach.shape, minval=least, maxval=1 + reach)
    return factors, jax.random.permutation(order_key, len(strengths))


def adjust_colors(
    image: Float[Array, "h w c"], factors: Float[Array, "3"], order: Int[Array, "3"]
) -> Float[Array, "h w c"]:
    """Scales the difference between an image and a degenerate image, once for each factor.

    The degenerate image is black for brightness (0), the mean gray for contrast (1), and the image
    in grayscale for saturation (2), which therefore leaves a grayscale image unchanged.
    """
    weights = GRAY / GRAY.sum() if image.shape[-1] == GRAY.size else np.ones(1)
    for which in order:
        gray = (image * weights).sum(-1, keepdims=True)
        degenerate = lax.select_n(
            which, *jnp.broadcast_arrays(jnp.zeros_like(gray), gray.mean(), gray)
        )
        image = jnp.clip(degenerate + factors[which] * (image - degenerate), 0, 1)
    return image


def pca_lighting(
    keys: Key[Array, "n"], images: Images, axes: Float[Any, "c c"], deviation: float
) -> Images:
    """Shifts the color of each image along the principal axes of the dataset's colors.

    Krizhevsky et al. 2012 use a standard deviation of 0.1.

    Args:
      keys: one for each image.
      images: in [0, 1]; results may lie outside.
      axes: from `normalization.color_axes`.
      deviation: standard deviation of the shift along each axis, in units of its length.
    """
    along = jax.vmap(lambda key: jax.random.normal(key, axes.shape[-1:]))(keys) * deviation
    return images + (along[:, None] * axes).sum(-1)[:, None, None]  # a matmul might run in TF32


def cutout(keys: Key[Array, "n"], images: Images, side: int) -> Images:
    """Fills a square around a random pixel with zeros, clipped at the border.

    DeVries & Taylor 2017.

    Args:
      keys: one for each image.
      images: normalized, so that zeros are the mean image.
      side: of the square, in pixels.
    """
    height, width = images.shape[1:3]

    def cut(key: Array, image: Array) -> Array:
        square = box_mask(random_pixel(key, height, width), (side, side), height, width)
        return jnp.where(square[..., None], 0, image)

    return jax.vmap(cut)(keys, images)


def random_erasing(keys: Key[Array, "n"], images: Images, probability: float) -> Images:
    """Fills a random rectangle inside the image with zeros.

    Zhong et al. 2017, with torchvision's defaults.

    Args:
      keys: one for each image.
      images: normalized, so that zeros are the mean image.
      probability: of erasing, for each image.
    """
    height, width = images.shape[1:3]
    sides = jnp.array([height, width])

    def erase(key: Array, image: Array) -> Array:
        erase_key, area_key, ratio_key, place_key = jax.random.split(key, 4)
        tries = (ERASING_TRIES,)
        low, high = ERASED_AREA
        area = height * width * jax.random.uniform(area_key, tries, minval=low, maxval=high)
        low, high = np.log(ERASED_RATIO)
        ratio = jnp.exp(jax.random.uniform(ratio_key, tries, minval=low, maxval=high))
        sizes = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio], -1))).astype(int)
        fits = (sizes < sides).all(-1)
        size = sizes[fits.argmax()]  # the first that fits
        corner = jax.random.randint(place_key, (2,), 0, sides - size + 1)
        rectangle = box_mask(corner + size // 2, size, height, width)
        erased = jax.random.bernoulli(erase_key, probability) & fits.any()
        return jnp.where(erased & rectangle[..., None], 0, image)

    return jax.vmap(erase)(keys, images)


def mix(key: Key[Array, ""], batch: Batch, mixup: float, cutmix: float) -> Batch:
    """Mixes each image and its targets with its neighbor's: 0 with 1, 1 with 0, 2 with 3, ...

    mixup (Zhang et al. 2017) averages two images; cutmix (Yun et al. 2019) pastes a box of one into
    the other. Targets are averaged with the image's share of pixels. As in the papers' code, one
    share is drawn per batch. The papers pair images by a random permutation; here batches are
    shuffled already, and neighbors lie on one device.

    Args:
      key: the same on every device.
      batch: `image` (n, h, w, c), n even; every floating-point entry is mixed.
      mixup: the share follows Beta(mixup, mixup); 0 is off.
      cutmix: the share follows Beta(cutmix, cutmix); 0 is off. If both are on, each batch uses
        either with probability 1/2.

    Raises:
      ValueError: `label` holds integers, which cannot be averaged.
    """
    if "label" in batch and not jnp.issubdtype(batch["label"].dtype, jnp.floating):
        raise ValueError(
            f"label is {batch['label'].dtype}: mixup and cutmix average labels, so the task must "
            "first encode them as floating-point targets, such as one-hot probabilities"
        )
    height, width = batch["image"].shape[1:3]
    weights = mixing_weights(key, height, width, mixup, cutmix)[..., None]
    share = weights.mean()

    def mixed(name: str, entry: Array) -> Array:
        if not jnp.issubdtype(entry.dtype, jnp.floating):
            return entry
        weight = weights if name == "image" else share
        return weight * entry + (1 - weight) * swap_neighbors(entry)

    return {name: mixed(name, entry) for name, entry in batch.items()}


def mixing_weights(
    key: Key[Array, ""], height: int, width: int, mixup: float, cutmix: float
) -> Float[Array, "h w"]:
    """Returns the weight of an image at each pixel when it is mixed with its neighbor."""
    which, share_key, place_key = jax.random.split(key, 3)
    pastes = jax.random.bernoulli(which) if mixup and cutmix else cutmix > 0
    alpha = jnp.where(pastes, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    sides = jnp.sqrt(1 - share) * jnp.array([height, width])
    even = sides.astype(int) // 2 * 2  # the paper's code goes half a side from the center, twice
    pasted = box_mask(random_pixel(place_key, height, width), even, height, width)
    return jnp.where(pastes, 1.0 - pasted, share)


def swap_neighbors(entry: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """Swaps entries in pairs: 0 with 1, 2 with 3, and so on."""
    pairs = entry.reshape(-1, 2, *entry.shape[1:])
    return pairs[:, ::-1].reshape(entry.shape)


def random_pixel(key: Key[Array, ""], height: int, width: int) -> Int[Array, "2"]:
    """Draws the row and column of a pixel."""
    return jax.random.randint(key, (2,), 0, jnp.array([height, width]))


def box_mask(center: Any, size: Any, height: int, width: int) -> Bool[Array, "h w"]:
    """Returns a mask of the rectangle of `size` (rows, columns) around the pixel `center`."""
    rows, columns = (
        (jnp.arange(side) >= middle - extent // 2)
        & (jnp.arange(side) < middle - extent // 2 + extent)
        for middle, extent, side in zip(center, size, (height, width), strict=True)
    )
    return rows[:, None] & columns

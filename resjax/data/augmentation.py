"""Augmentation on the device: pure functions of keys and a batch.

Every image has a key of its own, so what is drawn for it does not depend on how a batch is divided
among devices. What is drawn for a batch, how two images mix, has a key that all devices share.
"""

import enum
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from resjax.data.resident import Statistics, scale, standardize
from resjax.data.trivial_augment import GREY, trivial_augment

Images = Float[Array, "n h w c"]
Targets = Float[Array, "n classes"]
ERASED_SHARE = (0.02, 0.33)  # of an image's area, least and largest (Zhong et al. 2017)
ERASED_RATIO = (0.3, 3.3)  # of height to width
ERASING_TRIES = 10  # to find a rectangle that lies within the image, as torchvision tries


class Augmentation(NamedTuple):
    """What is asked for, as the config's `data` has it and tells it; each is off as it stands."""

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
    def asked(cls, config: Any) -> Self:
        """Takes its fields out of `Config.data`."""
        return cls(*(getattr(config, name) for name in cls._fields))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@enum.unique
class Draw(enum.IntEnum):
    """Numbers the draws of an image, so that one more leaves those of the others as they are."""

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
    images: UInt8[Array, "n h w c"],
    targets: Targets,
    statistics: Statistics,
    asked: Augmentation,
) -> tuple[Images, Targets]:
    """Applies all that is asked, normalises, and gives what the network learns from.

    The order is that of the recipes. Operations on bytes come first, then those on colours in
    [0, 1]; then normalisation, so that what padding, cutout and erasing fill with zeros is the mean
    image. Images mix last, as they would be seen alone.

    Args:
      keys: of every image.
      batch_key: of the batch.
      images: bytes.
      targets: probabilities of the classes.
      statistics: with `color_axes` where `pca_lighting` is asked for.
      asked: what is to be done.
    """

    def draw(number: Draw) -> Key[Array, "n"]:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)

    if asked.trivial_augment:
        images = trivial_augment(draw(Draw.TRIVIAL), images)
    seen = scale(images)
    if asked.color_jitter:
        seen = color_jitter(draw(Draw.JITTER), seen, asked.color_jitter)
    if asked.pca_lighting:
        assert statistics.color_axes is not None
        seen = pca_lighting(draw(Draw.LIGHTING), seen, statistics.color_axes, asked.pca_lighting)
    seen = standardize(seen, statistics)
    if asked.crop_padding:
        seen = pad_crop(draw(Draw.CROP), seen, asked.crop_padding)
    if asked.flip:
        seen = flip(draw(Draw.FLIP), seen)
    if asked.cutout:
        seen = cutout(draw(Draw.CUTOUT), seen, asked.cutout)
    if asked.random_erasing:
        seen = random_erasing(draw(Draw.ERASING), seen, asked.random_erasing)
    if asked.mixes:
        seen, targets = mix(batch_key, seen, targets, asked.mixup, asked.cutmix)
    return seen, targets


def pad_crop(keys: Key[Array, "n"], images: Images, padding: int) -> Images:
    """Pads every side by zeros and crops a window of the old size anywhere, as He et al. 2015 do.

    Zeros, so normalise first: then what is padded is the mean image.

    Args:
      keys: draw every image's own offset.
      images: (n, h, w, c).
      padding: pixels.
    """
    if not padding:
        return images
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def crop(key: Array, image: Array) -> Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return lax.dynamic_slice(image, (row, column, 0), images.shape[1:])

    return jax.vmap(crop)(keys, jnp.pad(images, sides))


def flip(keys: Key[Array, "n"], images: Images) -> Images:
    """Mirrors every image left to right with probability a half."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def color_jitter(keys: Key[Array, "n"], images: Images, strengths: tuple[float, ...]) -> Images:
    """Changes brightness, contrast and saturation, in any order, as torchvision's ColorJitter does.

    Args:
      keys: draw every image's factors and their order.
      images: in [0, 1], of 1 channel or 3.
      strengths: of brightness, contrast and saturation; a factor is uniform between `1 - strength`,
        or 0 if that is larger, and `1 + strength`.
    """

    def jitter(key: Array, image: Array) -> Array:
        return adjust_colors(image, *drawn_colors(key, strengths))

    return jax.vmap(jitter)(keys, images)


def drawn_colors(
    key: Key[Array, ""], strengths: tuple[float, ...]
) -> tuple[Float[Array, "3"], Int[Array, "3"]]:
    """The factors of `color_jitter`, and the order in which they come."""
    factor_key, order_key = jax.random.split(key)
    reach = jnp.asarray(strengths)
    least = jnp.maximum(1 - reach, 0)
    factors = jax.random.uniform(factor_key, reach.shape, minval=least, maxval=1 + reach)
    return factors, jax.random.permutation(order_key, len(strengths))


def adjust_colors(
    image: Float[Array, "h w c"], factors: Float[Array, "3"], order: Int[Array, "3"]
) -> Float[Array, "h w c"]:
    """Multiplies an image's distance to black (0), to its mean grey (1) and to its own greys (2).

    These are brightness, contrast and saturation; a greyscale image has none of the last to change.
    """
    weights = GREY / GREY.sum() if image.shape[-1] == GREY.size else np.ones(1)
    for which in order:
        grey = (image * weights).sum(-1, keepdims=True)
        degenerate = lax.select_n(
            which, *jnp.broadcast_arrays(jnp.zeros_like(grey), grey.mean(), grey)
        )
        image = jnp.clip(degenerate + factors[which] * (image - degenerate), 0, 1)
    return image


def pca_lighting(
    keys: Key[Array, "n"], images: Images, axes: Float[Any, "c c"], deviation: float
) -> Images:
    """Shifts the colour of every image along the principal axes of all colours.

    Krizhevsky et al. 2012, who draw the shift from a Gaussian of standard deviation 0.1.

    Args:
      keys: draw every image's own shift.
      images: in [0, 1]; what comes out may lie beyond.
      axes: as `feed.color_axes` gives them.
      deviation: standard deviation of the shift along an axis, in its length.
    """
    along = jax.vmap(lambda key: jax.random.normal(key, axes.shape[-1:]))(keys) * deviation
    return images + (along[:, None] * axes).sum(-1)[:, None, None]  # no product in TF32


def cutout(keys: Key[Array, "n"], images: Images, side: int) -> Images:
    """Puts zeros into a square, clipped where it leaves the image (DeVries & Taylor 2017).

    Args:
      keys: draw every image's own centre, any pixel.
      images: normalised, so that zeros are the mean.
      side: of the square, in pixels.
    """
    height, width = images.shape[1:3]

    def cut(key: Array, image: Array) -> Array:
        square = box(drawn_pixel(key, height, width), (side, side), height, width)
        return jnp.where(square[..., None], 0, image)

    return jax.vmap(cut)(keys, images)


def random_erasing(keys: Key[Array, "n"], images: Images, probability: float) -> Images:
    """Puts zeros into a rectangle within the image (Zhong et al. 2017, torchvision's defaults).

    Args:
      keys: draw whether an image is erased, and its rectangle.
      images: normalised, so that zeros are the mean.
      probability: that an image is erased.
    """
    height, width = images.shape[1:3]
    sides = jnp.array([height, width])

    def erase(key: Array, image: Array) -> Array:
        whether, share_key, ratio_key, place_key = jax.random.split(key, 4)
        tries = (ERASING_TRIES,)
        low, high = ERASED_SHARE
        area = height * width * jax.random.uniform(share_key, tries, minval=low, maxval=high)
        low, high = np.log(ERASED_RATIO)
        ratio = jnp.exp(jax.random.uniform(ratio_key, tries, minval=low, maxval=high))
        sizes = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio], -1))).astype(int)
        fits = (sizes < sides).all(-1)
        size = sizes[fits.argmax()]  # of the first that fits
        corner = jax.random.randint(place_key, (2,), 0, sides - size + 1)
        rectangle = box(corner + size // 2, size, height, width)
        erased = jax.random.bernoulli(whether, probability) & fits.any()
        return jnp.where(erased & rectangle[..., None], 0, image)

    return jax.vmap(erase)(keys, images)


def mix(
    key: Key[Array, ""], images: Images, targets: Targets, mixup: float, cutmix: float
) -> tuple[Images, Targets]:
    """Mixes every image and its target with its neighbour's: 0 with 1, 1 with 0, 2 with 3, ...

    mixup (Zhang et al. 2017) averages the two, cutmix (Yun et al. 2019) pastes a box of one into
    the other; the target is mixed by the share of pixels. As in the papers' code one share is drawn
    for a batch. There partners come from a permutation of the batch; here, where batches are
    shuffled already, they are neighbours, so that they lie on one device.

    Args:
      key: the same on every device.
      images: an even number.
      targets: probabilities of the classes.
      mixup: the share's distribution is Beta(mixup, mixup); 0 is off.
      cutmix: likewise; where both are on, each batch takes either with probability a half.
    """
    weights = kept(key, images.shape[1], images.shape[2], mixup, cutmix)[..., None]
    share = weights.mean()
    mixed = weights * images + (1 - weights) * partner(images)
    return mixed, share * targets + (1 - share) * partner(targets)


def kept(
    key: Key[Array, ""], height: int, width: int, mixup: float, cutmix: float
) -> Float[Array, "h w"]:
    """How much of every pixel an image keeps when it is mixed."""
    which, share_key, place_key = jax.random.split(key, 3)
    pastes = jax.random.bernoulli(which) if mixup and cutmix else cutmix > 0
    alpha = jnp.where(pastes, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    sides = jnp.sqrt(1 - share) * jnp.array([height, width])
    pasted = box(drawn_pixel(place_key, height, width), sides.astype(int), height, width)
    return jnp.where(pastes, 1.0 - pasted, share)


def partner(batch: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """Swaps neighbours: 0 with 1, 2 with 3, and so on."""
    pairs = batch.reshape(-1, 2, *batch.shape[1:])
    return pairs[:, ::-1].reshape(batch.shape)


def drawn_pixel(key: Key[Array, ""], height: int, width: int) -> Int[Array, "2"]:
    """The row and column of any pixel."""
    return jax.random.randint(key, (2,), 0, jnp.array([height, width]))


def box(center: Any, size: Any, height: int, width: int) -> Bool[Array, "h w"]:
    """Where a rectangle of `size` rows and columns about a pixel lies within an image."""
    rows, columns = (
        (jnp.arange(side) >= middle - extent // 2)
        & (jnp.arange(side) < middle - extent // 2 + extent)
        for middle, extent, side in zip(center, size, (height, width), strict=True)
    )
    return rows[:, None] & columns

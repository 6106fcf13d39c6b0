"""Pictures of masks and boxes over their images."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from resjax.data.examples import VOID

Picture = UInt8[np.ndarray, "h w 3"]

OPACITY = 0.55  # of a mask over its image
SMALLEST_SIDE = 256  # pixels of a picture with text; smaller images are enlarged


def palette(classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Returns a color for each class, black for class 0: those of PASCAL VOC's masks.

    Bit b of a color's channel c, from the highest, is bit 3 b + c of the class.
    """
    numbers = np.arange(classes)[:, None]
    channels = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        channels |= (((numbers >> (3 * bit + np.arange(3))) & 1) << (7 - bit)).astype(np.uint8)
    return channels


def as_picture(image: UInt8[np.ndarray, "h w c"]) -> Picture:
    """Returns an image of 1 or 3 channels in RGB."""
    return np.broadcast_to(image, (*image.shape[:2], 3)).copy()


def draw_mask(
    image: UInt8[np.ndarray, "h w c"], mask: Int[np.ndarray, "h w"], classes: int
) -> Picture:
    """Returns the image under the colors of a mask; class 0 and void pixels stay as they are."""
    picture = as_picture(image).astype(np.float32)
    shown = (mask > 0) & (mask != VOID)
    colors = palette(max(classes, VOID + 1))[mask]
    picture[shown] = (1 - OPACITY) * picture[shown] + OPACITY * colors[shown]
    return np.round(picture).astype(np.uint8)


def draw_boxes(
    image: UInt8[np.ndarray, "h w c"],
    boxes: Float[np.ndarray, "objects 4"],
    classes: Int[np.ndarray, "objects"],
    class_names: Sequence[str],
    scores: Float[np.ndarray, "objects"] | None = None,
) -> Picture:
    """Returns the image with boxes, their class names and, if there are any, their scores.

    Boxes of class 0 are left out. A small image is enlarged, so that the text can be read.
    """
    height, width = image.shape[:2]
    factor = max(-(-SMALLEST_SIDE // min(height, width)), 1)
    picture = Image.fromarray(as_picture(image)).resize(
        (width * factor, height * factor), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(picture)
    colors = palette(len(class_names))
    for index in np.flatnonzero(classes):
        label = int(classes[index])
        color = tuple(map(int, np.maximum(colors[label], 64)))
        left, top, right, bottom = (factor * float(side) for side in boxes[index])
        draw.rectangle((left, top, right, bottom), outline=color, width=max(factor // 2, 2))
        text = class_names[label]
        if scores is not None:
            text += f" {scores[index]:.2f}"
        place = draw.textbbox((left + 2, max(top - 12, 0)), text)
        draw.rectangle(place, fill=color)
        draw.text(place[:2], text, fill=(255, 255, 255) if sum(color) < 384 else (0, 0, 0))
    return np.asarray(picture)

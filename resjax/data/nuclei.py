"""Nuclei of cells under a fluorescence microscope: a real image with masks and boxes.

The package stardist (Schmidt et al. 2018), the extra `nuclei`, contains the image, 512x512 pixels,
and a label for every pixel: 0, or the number of one of 125 nuclei. Both come from the 2018 Data
Science Bowl (Caicedo et al. 2019, Nature Methods 16), image set BBBC038v1 of the Broad Bioimage
Benchmark Collection, which is in the public domain (CC0 1.0). A few of the brightest spots have no
label and count as background.

The image is cut into 64 tiles that do not overlap. The upper three quarters are the training split,
the lower quarter is the test split. A nucleus on the border of a tile is cut there, so it appears
in both tiles.
"""

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
from jaxtyping import Int

from resjax.data.boxes import Boxes, padded_boxes
from resjax.data.decoding import decoding
from resjax.data.examples import BOXES, DataError, Split
from resjax.data.image_files import read_image

SIDE = 64  # pixels of a tile
TRAINING_ROWS = 384  # of the image's 512
BLACK, WHITE = 1, 99.8  # percentiles of the training pixels
CLASS_NAMES = ("background", "nucleus")

FILES = {  # with their SHA-256: the same in stardist 0.8.5 to 0.9.2
    "img2d.tif": "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
    "mask2d.tif": "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f",
}


def images_folder() -> Path | None:
    """Returns stardist's folder of images, or None if stardist is not installed."""
    spec = importlib.util.find_spec("stardist")  # its import would take seconds
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "data" / "images"


def read_tiles() -> dict[str, Split]:
    """Returns the tiles of both splits with the targets `mask`, `boxes` and `classes`.

    Intensities are scaled linearly to 0 to 255 and clipped. As StarDist's own networks do, the 1st
    and the 99.8th percentile become black and white, here those of the training pixels.

    Raises:
      DataError: stardist is not installed, or its image is missing or another one.
    """
    folder = images_folder()
    if folder is None:
        raise DataError("the dataset nuclei needs stardist: pip install 'resjax[nuclei]'")
    intensities, labels = (_read(folder / name, FILES[name]) for name in FILES)
    black, white = np.percentile(intensities[:TRAINING_ROWS], (BLACK, WHITE))
    scaled = np.clip((intensities - black) / (white - black), 0, 1)
    pixels = np.round(255 * scaled).astype(np.uint8)[..., None]
    boxes = [_boxes(tile) for tile in _tiles(labels)]
    room = max(map(len, boxes))
    objects = [padded_boxes(each, np.ones(len(each), np.int32), room) for each in boxes]
    targets = {name: np.stack([each[name] for each in objects]) for name in BOXES}
    whole = Split(_tiles(pixels), {"mask": _tiles(labels > 0).astype(np.uint8), **targets})
    cut = TRAINING_ROWS // SIDE * (labels.shape[1] // SIDE)
    return {"train": whole[:cut], "test": whole[cut:]}


def _read(file: Path, expected: str) -> Int[np.ndarray, "h w"]:
    from PIL import Image

    content = read_image(file)
    if hashlib.sha256(content).hexdigest() != expected:
        raise DataError(f"{file}: is not the file of stardist 0.9.2; install that version again")
    with decoding(str(file)), Image.open(io.BytesIO(content), formats=["TIFF"]) as image:
        return np.asarray(image).astype(np.int32)


def _tiles(image: np.ndarray) -> np.ndarray:
    """Returns the tiles of an image, row by row: (tiles, SIDE, SIDE, ...)."""
    height, width, *channels = image.shape
    cut = image.reshape(height // SIDE, SIDE, width // SIDE, SIDE, *channels)
    return cut.swapaxes(1, 2).reshape(-1, SIDE, SIDE, *channels)


def _boxes(labels: Int[np.ndarray, "h w"]) -> Boxes:
    """Returns the boxes of the nuclei in a tile, in the order of their labels."""
    from scipy.ndimage import find_objects

    found = [each for each in find_objects(labels) if each]  # slices of rows and columns
    corners = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in found]
    return np.array(corners, np.float32).reshape(-1, 4)

"""Photographs, to see augmentation on what it is made for."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def photos() -> np.ndarray:
    """40 tiles of 32x32 pixels from two photographs that scikit-learn carries: (n, h, w, 3)."""
    side, (rows, columns) = 32, (13, 20)
    tiles = [
        photo[: rows * side, : columns * side]
        .reshape(rows, side, columns, side, 3)
        .swapaxes(1, 2)
        .reshape(-1, side, side, 3)
        for photo in load_sample_images().images
    ]
    return np.concatenate(tiles)[::13]

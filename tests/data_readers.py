"""Readers of one path each, for tests/limits.py."""

from pathlib import Path

from resjax.data.archives import read_archives


def read_folder_of_archives(folder: Path) -> None:
    """Reads the dataset after which the folder is named: `cifar10-something`."""
    read_archives(folder.name.partition("-")[0], folder)

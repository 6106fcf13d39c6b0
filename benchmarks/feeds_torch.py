"""Loads the images of `feeds.py` as PyTorch users do: Pillow, torchvision and a DataLoader."""

from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Photos(Dataset[tuple[Tensor, int]]):
    """A dataset of image files with their indices as labels."""

    def __init__(self, paths: list[Path], size: int):
        self.paths = paths
        # Returns bytes, as resjax does, without the time for a conversion to float.
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(size), transforms.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.paths[index].open("rb") as file:  # these two lines are from torchvision's loader
            image = Image.open(file).convert("RGB")
        return self.transform(image), index


def loader(
    paths: list[Path], size: int, batch_size: int, workers: int
) -> "DataLoader[tuple[Tensor, int]]":
    # Workers are spawned, because a fork of a process that has run JAX may hang.
    context = "spawn" if workers else None
    return DataLoader(
        Photos(paths, size),
        batch_size,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=context,
    )

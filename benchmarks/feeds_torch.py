"""The loader of `feeds.py` in PyTorch, as its users write it: Pillow, torchvision, a DataLoader."""

from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Photos(Dataset[tuple[Tensor, int]]):
    """Image files; as labels their numbers."""

    def __init__(self, paths: list[Path], size: int):
        self.paths = paths
        # Bytes, as ours: no time goes into floats.
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(size), transforms.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.paths[index].open("rb") as file:  # these two lines are torchvision's loader's
            image = Image.open(file).convert("RGB")
        return self.transform(image), index


def loader(
    paths: list[Path], size: int, batch_size: int, workers: int
) -> "DataLoader[tuple[Tensor, int]]":
    # Spawned: a fork of a process that has run JAX may hang.
    context = "spawn" if workers else None
    return DataLoader(
        Photos(paths, size),
        batch_size,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=context,
    )

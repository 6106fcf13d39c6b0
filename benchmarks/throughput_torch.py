"""The networks and training step of `throughput.py` in plain PyTorch: CIFAR ResNets, ResNet-50.

Layers, padding, BN and shortcuts are those of resjax, so the numbers of parameters are equal and a
step does the same work. ResNet-50 is torchvision's (v1.5, with the stride in the 3x3 convolution);
the CIFAR networks use option A of He et al. 2015 (arXiv 1512.03385).

The step follows PyTorch's advice for speed: channels last, autocast for bfloat16, a fused
optimizer, cuDNN's search, TF32 if JAX uses it by default, and `torch.compile` if it helps.

As a program, it prepares the training of one network, prints its costs as JSON, and then, for each
line that it reads, runs the steps of a measurement and prints their seconds per image.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's usual name

BN_EPSILON, BN_MOMENTUM = 1e-5, 0.1  # resjax's momentum of 0.9 weights the old value


def conv(inputs: int, features: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, features, kernel, stride, padding=kernel // 2, bias=False)


def norm(features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features, eps=BN_EPSILON, momentum=BN_MOMENTUM)


class Pad(nn.Module):
    """Subsamples, and appends channels of zeros (option A)."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.missing, self.stride = features - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


class Block(nn.Module):
    """Adds a branch and a shortcut, and applies ReLU."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def branch(inputs: int, features: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *(conv(inputs, features, 3, stride), norm(features), nn.ReLU(inplace=True)),
        *(conv(features, features, 3), norm(features)),
    )


def basic(inputs: int, features: int, stride: int) -> nn.Module:
    changes = stride > 1 or inputs != features
    shortcut = Pad(inputs, features, stride) if changes else nn.Identity()
    return Block(branch(inputs, features, stride), shortcut)


def plain(inputs: int, features: int, stride: int) -> nn.Module:
    return nn.Sequential(branch(inputs, features, stride), nn.ReLU(inplace=True))


def bottleneck(inputs: int, features: int, stride: int) -> nn.Module:
    inner = features // 4
    layers = nn.Sequential(
        *(conv(inputs, inner, 1), norm(inner), nn.ReLU(inplace=True)),
        *(conv(inner, inner, 3, stride), norm(inner), nn.ReLU(inplace=True)),
        *(conv(inner, features, 1), norm(features)),
    )
    changes = stride > 1 or inputs != features
    project = nn.Sequential(conv(inputs, features, 1, stride), norm(features))
    return Block(layers, project if changes else nn.Identity())


Layer = Callable[[int, int, int], nn.Module]


def cifar(depth: int, channels: int, width: int, classes: int, block: Layer) -> nn.Sequential:
    """Returns a network of 6n + 2 layers for small images, with `basic` or `plain` blocks."""
    stem = [conv(channels, width, 3), norm(width), nn.ReLU(inplace=True)]
    return network(stem, width, block, (width, 2 * width, 4 * width), (depth // 6,) * 3, classes)


def resnet50(classes: int) -> nn.Sequential:
    stem = [conv(3, 64, 7, 2), norm(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return network(stem, 64, bottleneck, (256, 512, 1024, 2048), (3, 4, 6, 3), classes)


def network(
    stem: list[nn.Module],
    inputs: int,
    block: Layer,
    widths: Sequence[int],
    stages: Sequence[int],
    classes: int,
) -> nn.Sequential:
    blocks = []
    for index, (features, count) in enumerate(zip(widths, stages, strict=True)):
        for position in range(count):
            stride = 2 if index and not position else 1
            blocks.append(block(inputs, features, stride))
            inputs = features
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*stem, *blocks, *head)


class Trainer:
    """Trains with SGD on one batch that stays on the device."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        *,
        bfloat16: bool,
        compiled: bool,
        rate: float,
        decay: float,
    ):
        """Prepares the training of a model.

        Args:
          model: The network; it is moved to the GPU if one is available.
          batch: Images (n, channels, height, width) in float32 and labels (n,).
          bfloat16: Whether to compute in bfloat16 under autocast; parameters stay in float32.
          compiled: Whether to use `torch.compile`, which on a GPU also captures CUDA graphs.
          rate: Learning rate; the momentum is 0.9.
          decay: Weight decay of all parameters.
        """
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        images, labels = batch
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.labels = labels.to(self.device)
        model = model.to(self.device, memory_format=torch.channels_last)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=rate, momentum=0.9, weight_decay=decay, fused=True
        )
        self.bfloat16 = bfloat16
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        self.apply: Callable[[Tensor], Tensor] = (
            torch.compile(model, mode=mode) if compiled else model
        )

    def steps(self, count: int) -> None:
        """Runs `count` steps and waits for the last one."""
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
                loss = F.cross_entropy(self.apply(self.images), self.labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Returns the peak of PyTorch's allocated GPU memory, or None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def measure(
    depth: int,
    small_images: bool,
    batch: Sequence[int],
    classes: int,
    compiled: bool,
    steps: int,
    **settings: Any,
) -> None:
    """Prints the costs of a network, and for each line of input the seconds per image.

    Args:
      depth: The number of layers: 50, or that of a network for small images.
      small_images: Whether it is a network for small images.
      batch: Number, height, width and channels of the images.
      classes: The number of classes.
      compiled: Whether to use `torch.compile`.
      steps: The number of steps of a measurement.
      **settings: Further arguments of `Trainer`.
    """
    number, height, width, channels = batch
    model = cifar(depth, channels, 16, classes, basic) if small_images else resnet50(classes)
    data = torch.randn(number, channels, height, width), torch.randint(classes, (number,))
    trainer = Trainer(model, data, compiled=compiled, **settings)

    def seconds(steps: int) -> float:
        start = time.monotonic()
        trainer.steps(steps)
        return time.monotonic() - start

    first = seconds(1)  # includes compilation
    seconds(steps)  # records CUDA graphs
    costs = {
        "compile_seconds": first,
        "peak_bytes": trainer.peak_bytes(),
        "parameters": trainer.parameters,
    }
    print(json.dumps(costs), flush=True)
    for _ in sys.stdin:
        print(seconds(steps) / (steps * number), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", type=json.loads, help="arguments of `measure` as JSON")
    measure(**parser.parse_args().settings)

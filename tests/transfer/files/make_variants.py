"""Writes variants.json beside it: outputs of PyTorch's and timm's networks that arrays do not show.

    python tests/transfer/files/make_variants.py

It was made with torch 2.14.1 and timm 1.0.31. The weights are those of `fill` in
benchmarks/parity.py, and the images those of `images`.
"""

import json
import sys
from pathlib import Path

import torch
from timm.layers import BlurPool2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "benchmarks"))
import parity  # noqa: E402

SHAPE = (2, 32, 32, 3)


class Pad(nn.Module):
    def __init__(self, planes):
        super().__init__()
        self.side = planes // 4

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))


class CifarBlock(nn.Module):
    """Option A as in akamaster/pytorch_resnet_cifar10, option B as in kuangliu/pytorch-cifar."""

    def __init__(self, inputs, planes, stride, option):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if inputs != planes and option == "A":
            self.shortcut = Pad(planes)
        elif inputs != planes:
            conv = nn.Conv2d(inputs, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarNetwork(nn.Module):
    def __init__(self, widths, option, pool=False):
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for number, width in enumerate(widths, 1):
            block = CifarBlock(before, width, 2 if number > 1 else 1, option)
            setattr(self, f"layer{number}", nn.Sequential(block))
            before = width
        self.stages = len(widths)
        self.linear = nn.Linear(before, 5)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, 2, 1) if self.pool else x
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.linear(x.mean((2, 3)))


def timm(block, layers=(1, 1, 1, 1), **options):
    narrow = {"channels": (8, 16, 32, 64), "stem_width": 4, "stem_type": "deep"}
    return ResNet(block, layers, num_classes=5, **narrow, **options)


VARIANTS = {
    "average": lambda: timm(BasicBlock, aa_layer=nn.AvgPool2d),
    "average_bottleneck": lambda: timm(Bottleneck, aa_layer=nn.AvgPool2d),
    "blur": lambda: timm(BasicBlock, aa_layer=BlurPool2d),
    "dilated": lambda: timm(Bottleneck, (2, 2, 2, 2), output_stride=8),
    "option_a": lambda: CifarNetwork((4, 8, 16), "A"),
    "four_stages": lambda: CifarNetwork((4, 8, 16, 32), "B"),
    "pooled": lambda: CifarNetwork((4, 8, 16, 32), "B", pool=True),
}


def write():
    images = torch.from_numpy(parity.images(SHAPE).transpose(0, 3, 1, 2))
    content = {}
    for name, build in VARIANTS.items():
        network = build().eval()
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        arrays = parity.fill(shapes)
        network.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
        with torch.no_grad():
            content[name] = {"shapes": shapes, "logits": network(images).numpy().tolist()}
    (HERE / "variants.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    write()

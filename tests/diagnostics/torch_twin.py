"""Writes torch_twin.json: what PyTorch's hooks measure in the networks of twin_cases.py.

It needs torch, the test that reads the file does not: `python torch_twin.py`. Networks and measures
are written here anew, from the papers and the definitions in README, in float64.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from twin_cases import BATCH, CASES, CLASSES, OVERRIDES, data, weights

FILE = Path(__file__).with_suffix(".json")


class Shortcut(nn.Module):
    """Options A and B of He et al. 2015, and none."""

    def __init__(self, kind, width, out, stride, normalize):
        super().__init__()
        self.kind, self.out, self.stride = kind, out, stride
        self.project = kind == "project" and (stride > 1 or width != out)
        if self.project:
            self.Conv_0 = nn.Conv2d(width, out, 1, stride, bias=False)
            if normalize:
                self.BatchNorm_0 = nn.BatchNorm2d(out)

    def forward(self, x):
        if self.kind == "none":
            return torch.zeros(())
        if self.project:
            x = self.Conv_0(x)
            return self.BatchNorm_0(x) if hasattr(self, "BatchNorm_0") else x
        return subsampled(x, self.out, self.stride)


class Branch(nn.Identity):
    """Marks the end of a branch, for a hook."""


def subsampled(x, out, stride):
    return functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, out - x.shape[1]))


class Block(nn.Module):
    def __init__(self, kind, shortcut, width, out, features, stride, first):
        super().__init__()
        self.preactivation = kind.startswith("preact")
        # The first block and those that change the shape share their first norm and ReLU.
        self.shares = first or stride > 1 or width != out
        layers = [(features, 3, stride), (out, 3, 1)]
        if kind.endswith("bottleneck"):
            layers = [(features, 1, 1), (features, 3, stride), (out, 1, 1)]
        self.count, size = len(layers), width
        for number, (channels, side, step) in enumerate(layers):
            conv = nn.Conv2d(size, channels, side, step, side // 2, bias=False)
            norm = nn.BatchNorm2d(size if self.preactivation else channels)
            setattr(self, f"Conv_{number}", conv)
            setattr(self, f"BatchNorm_{number}", norm)
            setattr(self, f"relu_{number}", nn.ReLU())
            size = channels
        self.branch = Branch()
        self.shortcut = Shortcut(shortcut, width, out, stride, not self.preactivation)

    def layer(self, kind, number, x):
        return getattr(self, f"{kind}_{number}")(x)

    def forward(self, x):
        if self.preactivation:
            y = self.relu_0(self.BatchNorm_0(x))
            carried = self.shortcut(y if self.shares else x)
            y = self.Conv_0(y)
            y = self.Conv_1(self.relu_1(self.BatchNorm_1(y)))
            return self.branch(y) + carried
        y = x
        for number in range(self.count):
            y = self.layer("BatchNorm", number, self.layer("Conv", number, y))
            if number < self.count - 1:
                y = self.layer("relu", number, y)
        return self.layer("relu", self.count - 1, self.branch(y) + self.shortcut(x))


class Stem(nn.Module):
    def __init__(self, width, preactivation):
        super().__init__()
        self.Conv_0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.preactivation = preactivation
        if not preactivation:
            self.BatchNorm_0, self.relu_0 = nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x):
        x = self.Conv_0(x)
        return x if self.preactivation else self.relu_0(self.BatchNorm_0(x))


class Network(nn.Module):
    """A CIFAR network whose modules have the paths of ours, with dots."""

    def __init__(self, fields):
        super().__init__()
        kind, width = fields.get("model.block", "basic"), fields["model.width"]
        self.preactivation = kind.startswith("preact")
        expansion, layers = (4, 3) if kind.endswith("bottleneck") else (1, 2)
        self.stem, size = Stem(width, self.preactivation), width
        for stage in range(3):
            blocks = nn.Module()
            features = width * 2**stage
            for number in range((fields["model.depth"] - 2) // (3 * layers)):
                stride, out = (2 if stage and not number else 1), features * expansion
                first = not stage and not number
                made = Block(kind, fields["model.shortcut"], size, out, features, stride, first)
                blocks.add_module(f"block{number + 1}", made)
                size = out
            self.add_module(f"stage{stage + 1}", blocks)
        if self.preactivation:
            self.norm, self.relu_0 = nn.BatchNorm2d(size), nn.ReLU()
        self.head = nn.Linear(size, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for stage in (self.stage1, self.stage2, self.stage3):
            for block in stage.children():
                x = block(x)
        if self.preactivation:
            x = self.relu_0(self.norm(x))
        return self.head(x.mean((2, 3)))


NAMES = {"Conv2d": {"weight": "kernel"}, "Linear": {"weight": "kernel", "bias": "bias"}}
AXES = {"Conv2d": (2, 3, 1, 0), "Linear": (1, 0)}


def parameters(network):
    """Yields the path of every parameter array in our layout, the array, and the axes of ours."""
    for path, module in network.named_modules():
        kind = type(module).__name__
        for name, array in module.named_parameters(recurse=False):
            ours = NAMES.get(kind, {"weight": "scale", "bias": "bias"})[name]
            axes = AXES.get(kind) if ours == "kernel" else None
            yield f"{path.replace('.', '/')}/{ours}", array, axes


def draw(network):
    for path, array, axes in parameters(network):
        shape = [array.shape[axis] for axis in axes] if axes else array.shape
        drawn = torch.tensor(weights(path, tuple(shape)))
        if axes:
            drawn = drawn.permute([axes.index(axis) for axis in range(len(axes))])
        array.data = drawn.contiguous()


def gives_to_norm(network, path):
    """Whether a convolution's output goes straight to a norm of the same module."""
    owner, _, name = path.rpartition(".")
    block = network.get_submodule(owner)
    if isinstance(block, Block) and block.preactivation:
        return name == "Conv_0"
    return hasattr(block, name.replace("Conv", "BatchNorm"))


class Measured:
    """Registers hooks, and collects what they measure, by name and path."""

    def __init__(self, network):
        self.found = {}
        self._carried, self._branches = {}, {}
        for path, module in network.named_modules():
            convolution = isinstance(module, nn.Conv2d) and not gives_to_norm(network, path)
            if convolution or isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.register_forward_hook(self.response(path))
            elif isinstance(module, nn.ReLU):
                module.register_forward_hook(self.activation(path))
            elif isinstance(module, Block):
                module.register_forward_hook(self.block(path))
                module.register_full_backward_hook(self.gradient(path))
            elif isinstance(module, Branch):
                module.register_forward_hook(self.keep(self._branches, path))
            elif isinstance(module, Shortcut):
                module.register_forward_hook(self.keep(self._carried, path))

    def add(self, name, path, value):
        self.found.setdefault(name, {})[path.replace(".", "/")] = float(f"{value.item():.9g}")

    def response(self, path):
        def hook(module, inputs, output):
            self.add("response_mean", path, output.mean())
            self.add("response_std", path, output.std(correction=0))

        return hook

    def activation(self, path):
        def hook(module, inputs, output):
            self.add("dead_relu_share", path, (output == 0).all(3).all(2).all(0).double().mean())

        return hook

    def keep(self, where, path):
        def hook(module, inputs, output):
            where[path.rpartition(".")[0]] = output.detach()

        return hook

    def block(self, path):
        def hook(module, inputs, output):
            branch, carried = self._branches[path].norm(), self._carried[path].norm()
            self.add("branch_share", path, branch / (branch + carried))
            x = subsampled(inputs[0], output.shape[1], inputs[0].shape[2] // output.shape[2])
            cosines = functional.cosine_similarity(x.flatten(1), output.flatten(1), eps=0)
            self.add("input_output_cosine", path, cosines.mean())

        return hook

    def gradient(self, path):
        def hook(module, inputs, outputs):
            self.add("activation_gradient_norm", path, outputs[0].norm())

        return hook


def measure(fields, steps):
    """Returns what is measured after some steps of SGD with momentum, by name and path."""
    images, labels = data()
    mean = (images.mean(0, dtype=np.float64) / 255).astype(np.float32)
    images = images.astype(np.float32) / np.float32(255) - mean
    images = torch.tensor(images.transpose(0, 3, 1, 2).astype(np.float64))
    labels = torch.tensor(labels)
    assert len(images) == BATCH
    network = Network(fields).double().train()
    draw(network)
    optimizer = torch.optim.SGD(
        network.parameters(),
        fields["optimizer.learning_rate"],
        momentum=0.9,
        weight_decay=fields["optimizer.weight_decay"],
    )
    for step in range(steps + 1):
        measured = Measured(network) if step == steps else None
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        before = {path: array.detach().clone() for path, array, _ in parameters(network)}
        optimizer.step()
    for path, array, _ in parameters(network):
        measured.add("gradient_norm", path, array.grad.norm())
        measured.add("parameter_norm", path, before[path].norm())
        moved = array.detach() - before[path]
        measured.add("update_ratio", path, moved.norm() / before[path].norm())
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            measured.add("running_mean", path, module.running_mean.square().mean().sqrt())
            measured.add("running_var", path, module.running_var.mean())
    return measured.found


if __name__ == "__main__":
    content = {
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "cases": {name: measure(OVERRIDES | each, steps) for name, (each, steps) in CASES.items()},
    }
    FILE.write_text(json.dumps(content) + "\n")

"""Writes torch_training.json: what PyTorch's training of the networks in training_cases.py gives.

It needs torch, the test that reads the file does not: `python torch_training.py`. The networks are
written here anew, from the papers and torchvision, in float64.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from training_cases import CASES, CLASSES, OVERRIDES, STEPS, data, weights

FILE = Path(__file__).with_suffix(".json")


class Network:
    """A residual network of a case; parameters are made at their first use."""

    def __init__(self, fields):
        self.model = {key: value for key, value in fields.items() if key.startswith("model.")}
        self.epsilon = fields.get("model.bn_epsilon", 1e-5)
        self.momentum = 1 - fields.get("model.bn_momentum", 0.9)
        self.parameters, self.running = {}, {}

    def parameter(self, path, *shape):
        if path not in self.parameters:
            self.parameters[path] = torch.tensor(weights(path, shape), requires_grad=True)
        return self.parameters[path]

    def conv(self, path, x, out, side, stride=1, groups=1, bias=False):
        kernel = self.parameter(f"{path}/kernel", side, side, x.shape[1] // groups, out)
        added = self.parameter(f"{path}/bias", out) if bias else None
        kernel = kernel.permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, added, stride, padding=side // 2, groups=groups)

    def norm(self, path, x):
        size, kind = x.shape[1], self.model.get("model.norm", "batch")
        if kind != "batch":
            name = f"{path.replace('BatchNorm', 'Bias')}/bias"
            bias = self.parameter(name, *((size,) if kind == "none" else ()))
            return x + bias.reshape(-1, 1, 1)
        one = torch.ones(size, dtype=torch.float64)
        mean, var = self.running.setdefault(path, (one * 0, one))
        scale, bias = (self.parameter(f"{path}/{name}", size) for name in ("scale", "bias"))
        return functional.batch_norm(x, mean, var, scale, bias, True, self.momentum, self.epsilon)

    def shortcut(self, path, x, out, stride, normalize):
        kind, changes = self.model["model.shortcut"], stride > 1 or x.shape[1] != out
        if kind == "none":
            return 0
        if kind == "pad":
            return functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, out - x.shape[1]))
        if not changes and kind != "project_all":
            return x
        if kind == "project_avg" and stride > 1:
            x, stride = functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False), 1
        x = self.conv(f"{path}/shortcut/Conv_0", x, out, 1, stride)
        return self.norm(f"{path}/shortcut/BatchNorm_0", x) if normalize else x

    def block(self, path, x, width, stride, first):
        options = self.model.get("model.block_options", {})
        kind = self.model.get("model.block", "basic")
        out = 4 * width if kind.endswith("bottleneck") else width
        if kind.startswith("preact"):
            y = functional.relu(self.norm(f"{path}/BatchNorm_0", x))
            shared = first or stride > 1 or x.shape[1] != out
            added = self.shortcut(path, y if shared else x, out, stride, normalize=False)
            if kind == "preact_basic":
                layers = ((width, 3, stride), (out, 3, 1))
            else:
                layers = ((width, 1, stride), (width, 3, 1), (out, 1, 1))
            for number, (features, side, strides) in enumerate(layers):
                if number:
                    y = functional.relu(self.norm(f"{path}/BatchNorm_{number}", y))
                y = self.conv(f"{path}/Conv_{number}", y, features, side, strides)
            return y + added
        if kind == "fixup_basic":
            return self.fixup(path, x, out, stride)
        order = kind.removesuffix("basic").removesuffix("bottleneck")
        groups = options.get("groups", 1)
        inner = width * options.get("group_width", 64) // 64 * groups
        if kind.endswith("basic"):
            layers = ((width, 3, stride, 1), (out, 3, 1, 1))
        elif options.get("stride_in_1x1"):
            layers = ((inner, 1, stride, 1), (inner, 3, 1, groups), (out, 1, 1, 1))
        else:
            layers = ((inner, 1, 1, 1), (inner, 3, stride, groups), (out, 1, 1, 1))
        y, last = x, len(layers) - 1
        for number, (features, side, strides, parts) in enumerate(layers):
            y = functional.relu(y) if number or order == "relu_preact_" else y
            y = self.conv(f"{path}/Conv_{number}", y, features, side, strides, parts)
            if number < last or order != "bn_after_addition_":
                y = self.norm(f"{path}/BatchNorm_{number}", y)
        if reduction := options.get("se_reduction"):
            gate = y.mean((2, 3), keepdim=True)
            name = f"{path}/SqueezeExcite_0"
            gate = functional.relu(
                self.conv(f"{name}/Conv_0", gate, out // reduction, 1, bias=True)
            )
            y = y * torch.sigmoid(self.conv(f"{name}/Conv_1", gate, out, 1, bias=True))
        if order == "relu_before_addition_":
            y = functional.relu(y)
        if self.model.get("model.branch_scale") == "learned":
            y = y * self.parameter(f"{path}/branch_scale/scale")
        if order == "relu_preact_" and (stride > 1 or x.shape[1] != out):
            x = functional.relu(x)
        y = y + self.shortcut(path, x, out, stride, normalize=True)
        if order == "bn_after_addition_":
            y = self.norm(f"{path}/BatchNorm_{last}", y)
        return y if order in ("relu_before_addition_", "relu_preact_") else functional.relu(y)

    def fixup(self, path, x, out, stride):
        biased = self.norm(f"{path}/Bias_0", x)
        y = self.conv(f"{path}/Conv_0", biased, out, 3, stride)
        y = functional.relu(self.norm(f"{path}/Bias_1", y))
        y = self.conv(f"{path}/Conv_1", self.norm(f"{path}/Bias_2", y), out, 3)
        y = self.norm(f"{path}/Bias_3", y * self.parameter(f"{path}/scale"))
        changes = stride > 1 or x.shape[1] != out
        added = self.shortcut(path, biased if changes else x, out, stride, normalize=False)
        return functional.relu(y + added)

    def stem(self, x, width, preactivation):
        kind = self.model.get("model.stem", "cifar")
        if kind == "deep":
            x = functional.relu(
                self.norm("stem/BatchNorm_0", self.conv("stem/Conv_0", x, width // 2, 3, 2))
            )
            x = functional.relu(
                self.norm("stem/BatchNorm_1", self.conv("stem/Conv_1", x, width // 2, 3))
            )
            x = functional.relu(
                self.norm("stem/BatchNorm_2", self.conv("stem/Conv_2", x, width, 3))
            )
        elif kind == "imagenet":
            x = functional.relu(
                self.norm("stem/BatchNorm_0", self.conv("stem/Conv_0", x, width, 7, 2))
            )
        else:
            x = self.conv("stem/Conv_0", x, width, 3)
            x = x if preactivation else functional.relu(self.norm("stem/BatchNorm_0", x))
        return x if kind == "cifar" else functional.max_pool2d(x, 3, 2, padding=1)

    def __call__(self, x):
        width, depth = self.model["model.width"], self.model["model.depth"]
        kind = self.model.get("model.block", "basic")
        offset = 4 if self.model["model.family"] == "wide" else 2
        blocks = (depth - offset) // (9 if kind.endswith("bottleneck") else 6)
        x = self.stem(x, width, kind.startswith("preact"))
        width *= self.model.get("model.widen", 1)
        for stage in range(3):
            for number in range(blocks):
                path = f"stage{stage + 1}/block{number + 1}"
                stride = 2 if stage and not number else 1
                x = self.block(path, x, width * 2**stage, stride, not stage and not number)
        if kind.startswith("preact"):
            x = functional.relu(self.norm("norm", x))
        if kind.startswith("relu_preact"):
            x = functional.relu(x)
        if self.model.get("model.norm") == "fixup":
            x = self.norm("norm", x)
        kernel = self.parameter("head/kernel", x.shape[1], CLASSES)
        return x.mean((2, 3)) @ kernel + self.parameter("head/bias", CLASSES)


def schedule(optimizer, fields):
    rates, kind = torch.optim.lr_scheduler, fields["optimizer.schedule"]
    if kind == "cosine":
        return rates.CosineAnnealingLR(optimizer, T_max=STEPS)
    if kind == "onecycle":
        peak = fields["optimizer.learning_rate"]
        return rates.OneCycleLR(optimizer, peak, total_steps=STEPS, cycle_momentum=False)
    factor = fields["optimizer.decay_factor"] if kind == "steps" else 1.0
    return rates.MultiStepLR(
        optimizer, milestones=[round(0.5 * STEPS), round(0.75 * STEPS)], gamma=factor
    )


def train(fields):
    """Returns the losses of all steps, and the squared norm of the last running statistics."""
    images, labels = data()
    mean = (images.mean(0, dtype=np.float64) / 255).astype(np.float32)
    images = images.astype(np.float32) / np.float32(255) - mean
    images = torch.tensor(images.transpose(0, 3, 1, 2).astype(np.float64))
    network, labels = Network(fields), torch.tensor(labels)
    network(images[:2])  # makes the parameters
    network.running.clear()
    decays_all = fields.get("optimizer.weight_decay_on", "all") == "all"
    decay = fields["optimizer.weight_decay"]
    groups = [
        {"params": [array], "weight_decay": decay if decays_all or path.endswith("kernel") else 0.0}
        for path, array in network.parameters.items()
    ]
    rate, momentum = fields["optimizer.learning_rate"], fields.get("optimizer.momentum", 0.9)
    if fields.get("optimizer.name") == "adamw":
        optimizer = torch.optim.AdamW(groups, rate, (momentum, 0.999))
    else:
        nesterov = fields.get("optimizer.nesterov", False)
        optimizer = torch.optim.SGD(groups, rate, momentum, nesterov=nesterov)
    scheduler = schedule(optimizer, fields)
    smoothing = fields.get("task.options", {}).get("label_smoothing", 0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), labels, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    running = sum(float((x**2).sum()) for pair in network.running.values() for x in pair)
    return {"losses": losses, "running": running}


if __name__ == "__main__":
    content = {
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "cases": {name: train(OVERRIDES | fields) for name, fields in CASES.items()},
    }
    FILE.write_text(json.dumps(content) + "\n")

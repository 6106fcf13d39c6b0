"""Writes torch_optimizers.json: steps of PyTorch's and timm's optimizers, and rates of schedules.

It needs torch and timm, the tests that read the file do not: `python torch_optimizers.py`.
"""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from timm.optim.nadamw import NAdamW
from timm.scheduler import CosineLRScheduler
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

FILE = Path(__file__).with_suffix(".json")
RATE, DECAY, BETAS, STEPS = 0.1, 0.05, (0.8, 0.95), 4

# By the name of a test: the class, its options, and the options of the config's section.
OPTIMIZERS = {
    "sgd": (SGD, {"momentum": 0.8}),
    "sgd, nesterov": (SGD, {"momentum": 0.8, "nesterov": True}),
    "lars": (Lars, {"momentum": 0.8}),
    "lars, nesterov": (Lars, {"momentum": 0.8, "nesterov": True}),
    "lamb": (Lamb, {"betas": BETAS, "max_grad_norm": None}),
    "adamw": (AdamW, {"betas": BETAS}),
    "adamw, nesterov": (NAdamW, {"betas": BETAS}),
}
SCHEDULES = {
    "onecycle": lambda sgd: OneCycleLR(sgd, RATE, total_steps=40),
    "cosine": lambda sgd: CosineAnnealingLR(sgd, T_max=40),
    "steps": lambda sgd: MultiStepLR(sgd, milestones=[20, 30]),
    "cosine, warm-up": lambda sgd: CosineLRScheduler(
        sgd, t_initial=35, warmup_t=5, warmup_prefix=True, t_in_epochs=False
    ),
}


def steps(kind, options):
    """Returns the parameters after each step; the norm has no decay and, in LARS, no own rate."""
    random = np.random.default_rng(0)
    kernel, scale = (
        torch.tensor(random.normal(size=size), requires_grad=True) for size in ((3, 2), (2,))
    )
    groups = [
        {"params": [kernel], "weight_decay": DECAY},
        {"params": [scale], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, lr=RATE, **options)
    found = []
    for _ in range(STEPS):
        kernel.grad, scale.grad = (
            torch.tensor(random.normal(size=x.shape)) for x in (kernel, scale)
        )
        optimizer.step()
        found.append({"kernel": kernel.tolist(), "scale": scale.tolist()})
    return found


def rates(schedule):
    sgd = SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    scheduler = schedule(sgd)
    found = []
    for step in range(40):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if isinstance(scheduler, CosineLRScheduler):
            scheduler.step_update(step + 1)
        elif step < 39:
            scheduler.step()
    return found


if __name__ == "__main__":
    content = {
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "optimizers": {name: steps(*entry) for name, entry in OPTIMIZERS.items()},
        "schedules": {name: rates(schedule) for name, schedule in SCHEDULES.items()},
    }
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.9g}"))
    FILE.write_text(json.dumps(rounded) + "\n")

"""Run folders as training leaves them, without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Record = dict[str, Any]


def config(
    depth: int = 20, shortcut: str = "pad", seed: int = 0, steps: int = 400, data: str = "digits"
) -> Record:
    """A resolved config, with every field that a run folder has."""
    return {
        "seed": seed,
        "model": {
            "family": "cifar",
            "depth": depth,
            "block": "basic",
            "block_options": {},
            "shortcut": shortcut,
            "shortcut_options": {},
            "width": 8,
            "widen": 1,
            "stem": "cifar",
            "loop": "auto",
            "dtype": "float32",
            "zero_init_residual": False,
            "stochastic_depth": 0.0,
            "bn_momentum": 0.9,
            "bn_epsilon": 1e-5,
        },
        "data": {
            "name": data,
            "batch_size": 64,
            "eval_batch_size": 256,
            "crop_padding": 1,
            "flip": False,
            "normalization": "pixel_mean",
        },
        "train": {
            "steps": steps,
            "log_every": max(steps // 160, 1),
            "eval_every": max(steps // 160, 1),
            "checkpoint_every": 0,
            "label_smoothing": 0.0,
        },
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 1e-4,
            "weight_decay_on": "all",
            "schedule": "steps",
            "boundaries": [0.5, 0.75],
            "decay_factor": 0.1,
            "warmup_steps": 0,
        },
    }


def measurements(settings: Record, points: int) -> list[Record]:
    """Curves shaped like those of figure 6: two drops of the rate, plain nets worse with depth."""
    steps, depth = settings["train"]["steps"], settings["model"]["depth"]
    noise = np.random.default_rng([settings["seed"], depth])
    plain = settings["model"]["shortcut"] == "none"
    final = 0.05 + 0.0012 * depth if plain else 0.085 - 0.012 * np.log(depth / 20 + 0.5)
    final *= 1 + 0.04 * noise.standard_normal()
    lines = []
    for step in np.unique(np.linspace(0, steps, points + 1).astype(int)[1:]).tolist():
        done = step / steps
        plateau = 1.0 if done <= 0.5 else 0.25 if done <= 0.75 else 0.0
        base = final * (1 + 0.9 * plateau) + 0.85 * np.exp(-18 * done)
        rate = 0.1 * 0.1 ** ((done > 0.5) + (done > 0.75))
        for split, factor in (("train", 0.7), ("test", 1.0)):
            wobble = 1 + (0.02 + 0.1 * plateau) * noise.standard_normal()
            error = float(np.clip(base * factor * wobble, 0, 0.9))
            line = {"step": step, "split": split, "loss": 3 * error, "error": error}
            lines.append(line | ({"learning_rate": rate} if split == "train" else {}))
    return lines


def write_run(
    folder: Path,
    settings: Record,
    points: int = 40,
    stop: float = 1.0,
    diverge: float | None = None,
) -> Path:
    """Writes one run folder.

    Args:
        folder: Where to write it.
        settings: Its resolved config.
        points: Measurements of either split.
        stop: The share of its steps after which it was killed, without a summary.
        diverge: The share of its steps after which its loss is not a number.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    provenance = {
        "commit": "1f2e3d4c5b6a79880123456789abcdef01234567",
        "dirty": False,
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "python": "3.11.7",
        "platform": "Linux",
        "devices": ["TFRT_CPU_0"],
        "device_kind": "cpu",
        "command": "resjax sweep experiments/degradation.py --config=configs/quickstart.py",
        "start": f"2026-01-05T10:00:{settings['seed']:02d}+00:00",
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    steps = settings["train"]["steps"]
    lines = [line for line in measurements(settings, points) if line["step"] <= stop * steps]
    for line in lines:
        if diverge is not None and line["step"] > diverge * steps:
            line |= {"loss": None, "error": 0.9}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if stop == 1.0:
        train, test = lines[-2:]
        best = min((line for line in lines[1::2]), key=lambda line: line["error"])
        summary = {
            "steps": steps,
            "train_loss": train["loss"],
            "train_error": train["error"],
            "test_loss": test["loss"],
            "test_error": test["error"],
            "best_test_error": best["error"],
            "best_test_step": best["step"],
            "parameters": 97_216 * (settings["model"]["depth"] - 2) // 6 - 21_926,
            "macs": 40_551_000,
            "seconds": 12.5,
            "images_per_second": 2048.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_sweep(
    root: Path,
    depths: tuple[int, ...] = (8, 20, 56),
    shortcuts: tuple[str, ...] = ("none", "pad"),
    seeds: tuple[int, ...] = (0, 1, 2),
    points: int = 40,
    steps: int = 400,
    data: str = "digits",
    **special: dict[str, Any],
) -> Path:
    """Writes a sweep folder; `special` has the options of `write_run` for runs by their name."""
    runs = []
    for depth in depths:
        for shortcut in shortcuts:
            for seed in seeds:
                name = f"depth{depth}-{shortcut.rpartition(':')[2]}-seed{seed}"
                settings = config(depth, shortcut, seed, steps, data)
                options = {"points": points} | special.get(name.replace("-", "_"), {})
                write_run(root / "runs" / name, settings, **options)
                overrides = {"model.depth": depth, "model.shortcut": shortcut, "seed": seed}
                runs.append({"folder": f"runs/{name}", "overrides": overrides})
    plan = {"experiment": "degradation", "command": "resjax sweep ...", "runs": runs}
    (root / "sweep.json").write_text(json.dumps(plan))
    return root


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep folder, as `write_sweep` says; by default all its runs are finished."""
    return lambda **options: write_sweep(tmp_path / "sweep", **options)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes one run folder by name, with the options of `config`, and of `write_run` in `how`."""
    return lambda name, how=None, **options: write_run(
        tmp_path / name, config(**options), **(how or {})
    )

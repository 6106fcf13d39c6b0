"""Fixtures that write run folders like those of training, without training."""

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
    """Returns a resolved config."""
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
    """Returns curves like those of He et al.'s figure 6: plain networks get worse with depth."""
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
    metric: Record | None = None,
) -> Path:
    """Writes one run folder.

    Args:
        folder: The folder to create.
        settings: The resolved config.
        points: The number of measurements per split.
        stop: The fraction of the steps after which the run was killed, without a summary.
        diverge: The fraction of the steps after which the loss is NaN.
        metric: The `primary_metric` of provenance.json; without it the run has errors.
    """
    name = metric["name"] if metric else "error"
    sign = 1 if metric is None or metric["lower_is_better"] else -1
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
    described = {"primary_metric": metric} if metric else {}
    (folder / "provenance.json").write_text(json.dumps(provenance | described))
    steps = settings["train"]["steps"]
    lines = [line for line in measurements(settings, points) if line["step"] <= stop * steps]
    for line in lines:
        if diverge is not None and line["step"] > diverge * steps:
            line |= {"loss": None, "error": 0.9}
        error = line.pop("error")
        line[name] = error if sign > 0 else 1 - error
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if stop == 1.0:
        train, test = lines[-2:]
        best = min((line for line in lines[1::2]), key=lambda line: sign * line[name])
        summary = {
            "steps": steps,
            "train_loss": train["loss"],
            f"train_{name}": train[name],
            "test_loss": test["loss"],
            f"test_{name}": test[name],
            f"best_test_{name}": best[name],
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
    """Writes a sweep folder; `special` maps names of runs to options of `write_run`."""
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


@pytest.fixture(scope="session")
def sweep_writer() -> Callable[..., Path]:
    """Returns `write_sweep`, for fixtures of a wider scope than `make_sweep`."""
    return write_sweep


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a sweep folder of finished runs; see `write_sweep`."""
    return lambda **options: write_sweep(tmp_path / "sweep", **options)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes one run folder with options of `config` and `write_run`."""
    return lambda name, how=None, **options: write_run(
        tmp_path / name, config(**options), **(how or {})
    )


ANGLE = {"name": "angle", "lower_is_better": True, "unit": "rad"}
ACCURACY = {"name": "accuracy", "lower_is_better": False, "unit": "fraction"}


@pytest.fixture
def make_tasks(make_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a folder with a run of an angle and one of an accuracy."""

    def write(points: int = 5) -> Path:
        make_run("angle", {"points": points, "metric": ANGLE}, depth=8)
        make_run("accuracy", {"points": points, "metric": ACCURACY}, depth=20)
        return tmp_path

    return write

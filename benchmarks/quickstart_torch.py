"""Runs the sweep of configs/quickstart.py in plain PyTorch, to compare its time with resjax.

Depths, seeds, data, batch size, steps, learning rates and evaluations are those of the config; the
random numbers are PyTorch's. Prints the total seconds and the final errors of each run.

    python benchmarks/quickstart_torch.py --workers=2
"""

import argparse
import json
import multiprocessing
import time
from itertools import product

import torch
from sklearn.datasets import load_digits
from throughput_torch import basic, cifar, plain
from torch.nn import functional as F  # noqa: N812 - PyTorch's usual name

DEPTHS, BLOCKS, SEEDS = (8, 20, 56), (plain, basic), (0, 1, 2)
WIDTH, BATCH, STEPS, EVALUATE_EVERY, RATE, DECAY = 8, 64, 300, 25, 0.1, 1e-4
TRAINING = 1437  # images; the other 360 are for the test


def train(depth, block, seed):
    """Trains a network; returns its error on the last training batches and on the test set."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = (images - images[:TRAINING].mean(0)).to(memory_format=torch.channels_last)
    labels = torch.tensor(digits.target)
    model = cifar(depth, 1, WIDTH, 10, block).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, (STEPS // 2, STEPS * 3 // 4))
    order = torch.cat([torch.randperm(TRAINING) for _ in range(STEPS * BATCH // TRAINING + 1)])
    wrong = 0
    for step, chosen in enumerate(order[: STEPS * BATCH].view(STEPS, BATCH), start=1):
        logits = model(images[chosen])
        loss = F.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        wrong = wrong + (logits.argmax(1) != labels[chosen]).sum()
        if step % EVALUATE_EVERY == 0:
            errors = {
                "train": float(wrong) / (EVALUATE_EVERY * BATCH),
                "test": test(model, images, labels),
            }
            wrong = 0
    return {"depth": depth, "block": block.__name__, "seed": seed, **errors}


def test(model, images, labels):
    model.eval()
    with torch.inference_mode():
        wrong = (model(images[TRAINING:]).argmax(1) != labels[TRAINING:]).float().mean()
    model.train()
    return float(wrong)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    workers = parser.parse_args().workers
    start = time.monotonic()
    runs = list(product(DEPTHS, BLOCKS, SEEDS))
    if workers == 1:
        finished = [train(*run) for run in runs]
    else:
        deepest_first = runs[::-1]
        with multiprocessing.get_context("spawn").Pool(
            workers, torch.set_num_threads, (1,)
        ) as pool:
            finished = pool.starmap(train, deepest_first, chunksize=1)
    print(json.dumps({"seconds": time.monotonic() - start, "runs": finished}))


if __name__ == "__main__":
    main()

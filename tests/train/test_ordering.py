"""Streams train on the batches of resident datasets."""

import json

import pytest

from resjax.train.loop import train

RUN = {
    "data.batch_size": 100,  # 14.37 batches per epoch
    "data.mixup": 1.0,
    "data.workers": 0,
    "optimizer.schedule": "constant",  # does not depend on the number of steps
    "train.accumulation_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 10,
    "train.checkpoint_every": 10,
}


@pytest.mark.usefixtures("regression")  # compiles in no time
def test_a_stream_trains_on_the_batches_of_a_resident_dataset(configure, tmp_path):
    curves = []
    for feed, lengths in {"device": (20,), "stream": (10, 20)}.items():  # resumes in mid-epoch
        for steps in lengths:
            config = configure(RUN | {"data.feed": feed, "train.steps": steps})
            train(config, tmp_path / feed)
        lines = (tmp_path / feed / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    resident, streamed = curves
    assert len(resident) > 20
    assert streamed == pytest.approx(resident, rel=1e-4)

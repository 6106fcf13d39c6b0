"""The runs of test_dense_training.py: small networks on a few scenes."""

RUN = {
    "model.depth": 8,
    "model.width": 4,
    "data.name": "scenes",
    "data.train_split": "train[:48]",
    "data.test_split": "test[:22]",
    "data.batch_size": 16,
    "data.eval_batch_size": 16,
    "data.flip": True,
    "optimizer.learning_rate": 0.01,
    "train.steps": 4,
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.checkpoint_every": 2,
}
TASKS = {
    "segmentation": {"task.name": "segmentation"},
    "detection": {"task.name": "detection", "task.options": {"channels": 4, "stages": 1}},
}
WAYS = {
    "jit": {},
    "sharded": {"parallel.shard_parameters": 8},
    "pmap": {"parallel.backend": "pmap"},
}

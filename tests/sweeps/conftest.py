"""The smallest run of a sweep."""

from typing import Any

import pytest


@pytest.fixture
def smallest() -> dict[str, Any]:
    """The fields of two steps of ResNet-8."""
    return {
        "model.depth": 8,
        "model.width": 4,
        "data.batch_size": 8,
        "train.steps": 2,
        "train.log_every": 1,
        "train.eval_every": 2,
    }

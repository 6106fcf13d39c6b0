"""Test of my_experiment.py, without training."""

from pathlib import Path

from resjax.sweeps.conformance import check_experiment


def test_it_can_be_launched():
    check_experiment(Path(__file__).with_name("my_experiment.py"), config="quickstart")

"""Measurements of trained networks, for the `measure` of experiments."""

from resjax.measurements.base import FinishedRun

__all__ = ["FinishedRun"]

"""Measurements of trained networks, for the `measure` of experiments."""

from resjax.measurements.base import FinishedRun
from resjax.measurements.curvature import Eigenpairs, Hessian, SpectralDensity
from resjax.measurements.lesions import (
    LesionedModel,
    block_names,
    delete,
    kendall_tau,
    permute,
    random_orders,
)
from resjax.measurements.loss_surface import grid, loss_surface, random_direction

__all__ = [
    "Eigenpairs",
    "FinishedRun",
    "Hessian",
    "LesionedModel",
    "SpectralDensity",
    "block_names",
    "delete",
    "grid",
    "kendall_tau",
    "loss_surface",
    "permute",
    "random_direction",
    "random_orders",
]

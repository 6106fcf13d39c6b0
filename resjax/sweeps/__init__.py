"""Sweeps: the runs of an experiment, and the launchers that train them.

Experiment files import the algebra from here.
"""

from resjax.sweeps.algebra import chain, choose, param, product, zipped

__all__ = ["chain", "choose", "param", "product", "zipped"]

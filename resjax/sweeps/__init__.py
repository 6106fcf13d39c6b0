"""Sweeps: which runs an experiment consists of, and how they are run.

The algebra is public here, since experiment files write in it.
"""

from resjax.sweeps.algebra import chain, param, product, zipped

__all__ = ["chain", "param", "product", "zipped"]

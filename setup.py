"""Puts configs/ and experiments/ into the package, where an installed resjax finds them by name."""

from setuptools import find_packages, setup

SHIPPED = {"resjax.configs": "configs", "resjax.experiments": "experiments"}

setup(packages=[*find_packages(include=["resjax", "resjax.*"]), *SHIPPED], package_dir=SHIPPED)

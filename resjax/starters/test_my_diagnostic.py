"""Test of my_diagnostic.py."""

from resjax.diagnostics.conformance import check_diagnostic


def test_it_works_in_every_network():
    check_diagnostic("my_diagnostic:my_diagnostic")

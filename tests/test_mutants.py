"""The faults of `make mutants` are edits of today's code, and their tests exist."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
mutants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)


@pytest.mark.parametrize("fault", mutants.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_to_the_code(fault):
    assert (mutants.ROOT / fault.file).read_text("utf-8").count(fault.old) == 1
    assert fault.new != fault.old
    assert (mutants.ROOT / fault.tests.split()[0]).is_file()

"""Files that other libraries wrote; files/make.py made them."""

from pathlib import Path

import numpy as np
import pytest

from resjax.config import UserError
from resjax.transfer.files import read_arrays


@pytest.fixture(scope="session")
def foreign() -> Path:
    return Path(__file__).parent / "files"


@pytest.fixture(scope="session")
def same():
    """Holds arrays to those of an .npz file, types and shapes included."""

    def check(arrays, path):
        with np.load(path) as expected:
            assert arrays.keys() == set(expected)
            for name, array in arrays.items():
                assert array.dtype == expected[name].dtype, name
                np.testing.assert_array_equal(array, expected[name], name)
                assert array.shape == expected[name].shape, name

    return check


@pytest.fixture(scope="session")
def refusal():
    """The line by which a file is refused, which names it."""

    def line(path):
        with pytest.raises(UserError) as refused:
            read_arrays(path)
        (line,) = str(refused.value).splitlines()
        assert line.startswith(str(path))
        return line

    return line


@pytest.fixture(scope="session")
def outcome():
    """The line by which a file is refused, or that it holds arrays; anything else is a fault."""

    def lines(path):
        try:
            return ["arrays"] if read_arrays(path).arrays else []
        except UserError as error:
            return str(error).splitlines()

    return lines

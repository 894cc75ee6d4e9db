"""The ground that the matrix and the fuzz tests share."""

import pytest

from tests.bad_inputs.ground import Ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> Ground:
    """Good inputs, made once; no test changes them."""
    return Ground(tmp_path_factory.mktemp("ground"))

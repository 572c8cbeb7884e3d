import pytest


@pytest.fixture(scope="module")
def few_rows():
    """`device.few_rows` for a whole file."""
    from tests.kernels import device  # here, since the tests that start processes of their own need none of it

    with device.few_rows():
        yield

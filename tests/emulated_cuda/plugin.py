"""For pytest: tests run on the emulated device, and one during which it has found a race fails.

PYTHONPATH=tests python -m pytest -p emulated_cuda.plugin -m "gpu or emulated"
"""

from collections.abc import Iterator

import pytest

from emulated_cuda import library
from emulated_cuda.load import load

load()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Begin each test with nothing reported, and fail it if a race was; tests of races forget theirs."""
    library.reset()
    yield
    if library.races:
        pytest.fail("\n".join(["the emulated device has found races:", *library.races]), pytrace=False)

"""Tests of the emulated device need it: `make emulated` loads it. Elsewhere they are skipped."""

import pytest

from emulated_cuda.library import is_loaded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that are marked, where the device is not loaded."""
    if is_loaded():
        return
    for item in items:
        if item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="needs the emulated device: make emulated"))

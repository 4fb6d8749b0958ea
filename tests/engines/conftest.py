"""A lock between the test files that start Ray, since `--address auto` finds any Ray that runs on this machine."""

from __future__ import annotations

import pytest
from filelock import FileLock

RAY = {"tests.engines.test_cluster", "tests.engines.test_engines"}


@pytest.fixture(scope="module", autouse=True)
def _one_ray_at_a_time(request, tmp_path_factory):
    if request.module.__name__ not in RAY:
        yield
        return
    # The folders of the processes of pytest-xdist have a common parent.
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield

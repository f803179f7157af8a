"""pytest's settings: what every test needs, and what is different when pytest itself runs under mpirun."""

from __future__ import annotations

import os

import hypothesis
import pytest
from devices import device, double, gpu  # noqa: F401  fixtures
from ranks import UNDER_MPIRUN

from minidist.comm import world

# Every rank must draw the same examples, and on a shared machine a slow one is no failure.
hypothesis.settings.register_profile("shared", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("shared")

# Tests start hundreds of processes. Each would compile all of minidist anew, which takes longer than to import it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_xdist_auto_num_workers() -> int | None:
    """Under mpirun every rank runs every test, so that there are no workers; else as many as there are cores."""
    return 0 if UNDER_MPIRUN else None


@pytest.hookimpl(trylast=True)  # after the reporter has been made
def pytest_configure(config: pytest.Config) -> None:
    if UNDER_MPIRUN and world().rank > 0:
        config.pluginmanager.unregister(name="terminalreporter")  # rank 0 reports for all


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if UNDER_MPIRUN:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("ranks") is None])
        items[:] = [item for item in items if item.get_closest_marker("ranks") is not None]
    items.sort(key=lambda item: item.path.stem != "test_under_mpirun")  # the longest first, so that no worker ends late

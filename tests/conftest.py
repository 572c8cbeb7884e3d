"""Fixtures for all tests. None of them is used unasked."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from support.cases import cases

# The first scan compiles, and machines differ: no test may fail for being slow.
settings.register_profile(
    "untimed", max_examples=cases(100), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")

_LASTING = "weightwire-control"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: the tests of a file share fixtures and stay on one worker, and so do all of a lab, which
    takes long to start, unless they say themselves what goes together. Those marked `spread` come first, and labs next,
    so that no worker is left alone at the end."""
    for item in items:
        if not (item.get_closest_marker("spread") or item.get_closest_marker("xdist_group")):
            item.add_marker(pytest.mark.xdist_group(_lab(item) or str(item.path)))
    items.sort(key=lambda item: 0 if item.get_closest_marker("spread") else 1 if _lab(item) else 2)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without groups all is still right, but takes twice as long: that must not happen unseen."""
    apart = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
    if apart and getattr(session.config.option, "loadgroup", False):
        raise pytest.UsageError(f"pytest-xdist does not keep together what shares fixtures: {apart[0]}")


def _lab(item: pytest.Item) -> str | None:
    return next(
        (name for name in getattr(item, "fixturenames", ()) if name in ("lab", "peft_lab", "trainer_lab")), None
    )


@pytest.fixture
def shm_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that the `shm` transport of this process uses for /dev/shm; at the end nothing may be left in it."""
    from weightwire import transports
    from weightwire.transports import shm

    with tempfile.TemporaryDirectory(prefix="test-weightwire-", dir=shm.ROOT) as folder:
        root = Path(folder)
        monkeypatch.setitem(transports._MAKERS, "shm", lambda weights: shm.Shm(root))
        monkeypatch.setitem(transports._FETCH, "shm", partial(shm.fetch, root=root))
        monkeypatch.setitem(transports._PROBE, "shm", partial(shm.probe, root=root))
        yield root
        _wait_until_empty(lambda: [path.name for path in root.iterdir()], "shared memory")


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    """At the end, no thread of this package may run but those that ran before, and the loop that lasts."""
    before = set(threading.enumerate())
    yield
    _wait_until_empty(
        lambda: [
            thread.name
            for thread in threading.enumerate()
            if thread not in before and thread.name.startswith("weightwire") and thread.name != _LASTING
        ],
        "threads",
    )


def _wait_until_empty(left, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while found := left():
        assert time.monotonic() < deadline, f"{what} left behind: {found}"
        time.sleep(0.01)

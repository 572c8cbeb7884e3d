"""What the tests themselves clear away."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from support.sessions import left_over


def test_a_semaphore_that_no_child_has_opened_yet_is_not_left_over() -> None:
    lock = multiprocessing.get_context("spawn").Lock()
    name = lock._semlock.name.replace("/", "sem.")  # type: ignore[attr-defined]
    assert (Path("/dev/shm") / name).exists()
    assert name not in {path.name for path in left_over("sem.mp-")}


def test_what_nobody_has_mapped_is(tmp_path: Path) -> None:
    left = Path("/dev/shm") / f"test-weightwire-{tmp_path.name}"
    left.touch()
    try:
        assert left in left_over("test-weightwire-")
    finally:
        left.unlink()

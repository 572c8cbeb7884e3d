"""The trainer's half of NCCL, without a GPU: when its group is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weightwire.transports import nccl


class Group:
    aborted = False

    def abort(self) -> None:
        self.aborted = True


def sent_by(owner: nccl.Nccl, complete: bool) -> Any:
    """A sender whose last broadcast nobody has taken, or everybody. Waits end as they do once a commit was answered."""
    meeting: Any = SimpleNamespace(store=None, places=lambda key, links: (["nccl:host:1/key/1/2"], 2))
    sender = nccl._Sender(owner, meeting, [], [], 8, lambda ready, what: None, 1.0)
    sender._sent = [SimpleNamespace(is_completed=lambda: True), SimpleNamespace(is_completed=lambda: complete)]
    return sender


@pytest.mark.parametrize("complete", [True, False])
def test_a_group_in_which_something_was_left_is_not_kept(complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_LAG_SECONDS", 0.01)
    owner = nccl.Nccl(SimpleNamespace())  # type: ignore[arg-type]
    owner._group = nccl._Group("key", [], group := Group())
    sender = sent_by(owner, complete)
    assert sender.addresses == ["nccl:host:1/key/1/2/kept"]
    sender.finish()
    sender.close()
    assert (owner._group is not None, group.aborted) == (complete, not complete)


def test_of_an_update_that_ended_before_it_was_sent_no_group_is_kept() -> None:
    owner = nccl.Nccl(SimpleNamespace())  # type: ignore[arg-type]
    owner._group = nccl._Group("key", [], group := Group())
    sent_by(owner, True).close()
    assert owner._group is None
    assert group.aborted

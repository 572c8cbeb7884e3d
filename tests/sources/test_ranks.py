import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from weightwire.errors import BusyError, EngineError, PublishError, SourceError
from weightwire.sources.ranks import Ranks
from weightwire.updates.digest import Digest, Scan

SOON = 10.0


def test_without_a_process_group_there_are_no_ranks():
    with pytest.raises(SourceError, match="init_process_group"):
        Ranks.over_default_group(timeout=1.0)


def talks(rank, size):
    ranks = Ranks.over_default_group(timeout=SOON)
    assert (ranks.rank, ranks.size) == (rank, size)
    for data in (b"", b"\x00", bytes(range(256)) * 5000):
        assert ranks.share(data if rank == 0 else None) == data

    most = (1 << 64) - 1
    scans = [Scan(Digest(most, 1 << 63), rank), Scan(Digest(rank, 0), 0)]
    assert ranks.total(scans) == [Scan(Digest(2**64 - size, 0), sum(range(size))), Scan(Digest(sum(range(size)), 0), 0)]
    assert ranks.total([]) == []

    gathered = ranks.gather(torch.full((2, 2), rank))
    assert [int(table[1, 1]) for table in gathered] == list(range(size))

    assert ranks.reason(None) is None
    assert ranks.reason(f"odd {rank}") == "odd 0"
    assert ranks.reason("odd" if rank else None) == "rank 1: odd"

    if rank == 0:
        out = torch.zeros(10, dtype=torch.uint8)
        ranks.receive(out[5:], 1)
        assert out.tolist() == [0] * 5 + [1, 2, 3, 4, 5]
    elif rank == 1:
        ranks.send(torch.arange(1, 6, dtype=torch.uint8), 0)
    ranks.agree(None)
    ranks.close()
    ranks.close()
    with pytest.raises(SourceError, match="was closed"):
        ranks.agree(None)
    default_group_works(size)


def default_group_works(size):
    one = torch.ones(1)
    dist.all_reduce(one)
    assert int(one) == size


def test_ranks_share_add_gather_and_leave_the_default_group_alone(lab):
    lab(talks, 2)


def agrees(rank, size):
    ranks = Ranks.over_default_group(timeout=SOON)
    for _ in range(2):
        ranks.agree(None)

    mine = BusyError("being staged", engine="e", phase="begin", next_step="Wait.", details={"until": 3, "odd": {1}})
    with pytest.raises(BusyError) as caught:
        ranks.agree(mine if rank == 1 else None)
    error = caught.value
    assert str(error) == "e: begin: rank 1: being staged. Wait."
    assert error.details["rank"] == 1
    assert error.details["until"] == 3
    assert (error is mine) == (rank == 1)

    with pytest.raises(BusyError, match=r"^e: begin: rank 1: being staged. Wait.$"):
        ranks.agree(error)

    with pytest.raises(EngineError, match="rank 0: failed on 0"):
        ranks.agree(EngineError(f"failed on {rank}"))

    with pytest.raises(PublishError) as caught:
        ranks.agree(PublishError("some did not", outcomes={"e": 1}) if rank == 0 else None)
    assert caught.value.outcomes == ({"e": 1} if rank == 0 else {})
    ranks.agree(None)
    default_group_works(size)


def test_an_error_on_one_rank_is_the_same_error_on_all(lab):
    lab(agrees, 3)


def comes_late(rank, size):
    ranks = Ranks.over_default_group(timeout=1.0)
    if rank == 1:
        time.sleep(2.5)
    started = time.monotonic()
    with pytest.raises(SourceError, match=f"rank {rank} of 2 waited in vain for the other ranks"):
        ranks.agree(None)
    assert time.monotonic() - started < SOON
    with pytest.raises(SourceError, match="has left the ranks' group: it waited in vain"):
        ranks.share(b"")
    default_group_works(size)


def test_a_rank_that_comes_too_late_is_an_error_not_a_hang(lab):
    lab(comes_late, 2)


def stays_away(rank, size):
    if rank == 0:
        with pytest.raises(SourceError, match="waited in vain for all 2 ranks to form a group"):
            Ranks.over_default_group(timeout=1.0)
    dist.barrier()
    default_group_works(size)


def test_a_rank_that_never_joins_is_an_error_not_a_hang(lab):
    lab(stays_away, 2)


def one_dies(rank, size):
    ranks = Ranks.over_default_group(timeout=60.0)
    if rank == 3:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(SourceError, match=f"rank {rank} of {size} waited in vain"):
        # Rank 2 waits for rank 1, which lives, and which waits for rank 0.
        ranks.receive(torch.zeros(1, dtype=torch.uint8), {0: 3, 1: 0, 2: 1}[rank])
    assert time.monotonic() - started < SOON


def test_the_death_of_one_rank_reaches_those_that_wait_for_others(lab):
    lab(one_dies, 4, dies={3})

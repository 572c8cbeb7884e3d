"""Small updates over the `shm` transport: through a socket, with readers that come late, go early or never come."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from weightwire.errors import TransportError
from weightwire.receiver import Arrivals
from weightwire.transports import shm, unix_socket
from weightwire.transports.base import Link, Sender
from weightwire.updates.buckets import Bucket

UPDATE = "0123456789abcdef" * 2
SECONDS = 60.0


def buckets_of(*sizes: int) -> list[Bucket]:
    return [Bucket(index, nbytes, ()) for index, nbytes in enumerate(sizes)]


def arrivals_of(buckets: Sequence[Bucket], *, update: str = UPDATE, rank: int = 0, lease: float = SECONDS) -> Arrivals:
    return Arrivals(update=update, rank=rank, tensors=(), buckets=buckets, lease=lease, cancelled=threading.Event())


def wait(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.0005)


def refuse(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 0.2
    while not ready():
        if time.monotonic() > deadline:
            raise TransportError(what)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def sender_of(root: Path, buckets: Sequence[Bucket], *, ranks: int = 1, wait: Callable[..., None] = wait) -> Sender:
    return shm.Shm(root).sender(
        [Link(engine="e", update=UPDATE, ranks=ranks, put=lambda *_: None)], buckets, wait, SECONDS
    )


class Reader(threading.Thread):
    """A rank that fetches an update; `got` by bucket, or `error`."""

    def __init__(self, root: Path, arrivals: Arrivals) -> None:
        super().__init__(daemon=True)
        self.root, self.arrivals = root, arrivals
        self.got: dict[int, torch.Tensor] = {}
        self.error: TransportError | None = None
        self.start()

    def run(self) -> None:
        try:
            for index, data in shm.fetch("shm:", self.arrivals, self.root):
                self.got[index] = data.clone()
        except TransportError as error:
            self.error = error


def fill(sender: Sender, buckets: Sequence[Bucket], sent: Sequence[torch.Tensor]) -> None:
    for bucket, data in zip(buckets, sent, strict=True):
        sender.buffer(bucket).copy_(data)
        sender.send(bucket)


def random(buckets: Sequence[Bucket]) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (bucket.nbytes,), dtype=torch.uint8) for bucket in buckets]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("engines", [("a" * 32,), ("a" * 32, "b" * 32)])
def test_every_rank_of_every_engine_gets_what_was_sent_whether_it_comes_early_or_late(
    root: Path, when: str, engines: Sequence[str]
) -> None:
    buckets = buckets_of(300, 5000, 1 << 20, 1, 3 << 20)
    sent = random(buckets)
    links = [Link(engine=id[0], update=id, ranks=2, put=lambda *_: None) for id in engines]

    def read() -> list[Reader]:
        return [Reader(root, arrivals_of(buckets, update=id, rank=rank)) for id in engines for rank in range(2)]

    readers = read() if when == "before" else []
    sender = shm.Shm(root).sender(links, buckets, wait, SECONDS)
    assert sender.addresses == ["shm:"] * len(engines)
    fill(sender, buckets, sent)
    readers = readers or read()
    sender.finish()
    assert list(root.iterdir()) == []  # as soon as all have come
    sender.close()
    for reader in readers:
        reader.join(SECONDS)
        assert reader.error is None
        assert all(torch.equal(reader.got[i], data) for i, data in enumerate(sent))


def test_nobody_is_waited_for_before_the_end(root: Path) -> None:
    buckets = buckets_of(300, 5000, 4 << 20)
    asked: list[str] = []
    sender = sender_of(root, buckets, wait=lambda ready, what: asked.append(what))
    fill(sender, buckets, random(buckets))
    assert not asked
    sender.finish()
    assert asked == ["the last buckets to be read"]
    sender.close()


def test_a_stranger_at_one_engines_socket_takes_no_place_at_anothers(root: Path) -> None:
    buckets = buckets_of(300)
    links = [Link(engine=id, update=id * 32, ranks=1, put=lambda *_: None) for id in "ab"]
    sender = shm.Shm(root).sender(links, buckets, refuse, SECONDS)
    fill(sender, buckets, random(buckets))
    stranger = socket.socket(socket.AF_UNIX)
    with unix_socket._short(shm._socket(root, "a" * 32)) as path:
        stranger.connect(path)
    reader = Reader(root, arrivals_of(buckets, update="b" * 32))
    with pytest.raises(TransportError, match="last buckets to be read"):
        sender.finish()  # by the stranger, who does not
    reader.join(SECONDS)
    assert reader.got.keys() == {0}
    sender.close()
    stranger.close()


def test_a_reader_that_is_not_let_in_waits_as_long_as_the_lease(root: Path) -> None:
    buckets = buckets_of(300)
    sender = sender_of(root, buckets, wait=refuse)
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(8)]
    for stranger in strangers:
        stranger.setblocking(False)
        with contextlib.suppress(BlockingIOError), unix_socket._short(shm._socket(root, UPDATE)) as path:
            stranger.connect(path)
    with pytest.raises(TransportError, match=r"sent nothing for 0\.05 s"):
        list(shm.fetch("shm:", arrivals_of(buckets, lease=0.05), root))
    sender.close()
    for stranger in strangers:
        stranger.close()


def test_of_nothing_nobody_is_waited_for(root: Path) -> None:
    sender = sender_of(root, [], wait=refuse)
    sender.finish()
    assert list(shm.fetch("shm:", arrivals_of([]), root)) == []
    sender.close()


def test_only_this_user_can_connect(root: Path) -> None:
    buckets = buckets_of(300)
    sender = sender_of(root, buckets)
    assert [path.stat().st_mode & 0o777 for path in root.iterdir()] == [0o600]
    sender.close()


def test_the_memory_is_taken_again_by_the_next_small_update_and_let_go_at_the_end(root: Path) -> None:
    transport, places = shm.Shm(root), []
    for sizes in ((300, 5000), (200, 4000)):
        buckets = buckets_of(*sizes)
        sender = transport.sender([Link(engine="e", update=UPDATE, ranks=1, put=lambda *_: None)], buckets, wait, 1.0)
        places.append(sender.buffer(buckets[0]).data_ptr())
        sender.close()
    assert places[0] == places[1]
    transport.close()
    assert transport._memory is None


def test_a_trainer_that_goes_is_noticed_at_once(root: Path) -> None:
    buckets = buckets_of(300, 5000)
    reader = Reader(root, arrivals_of(buckets))
    sender = sender_of(root, buckets)
    sender.buffer(buckets[0])
    sender.send(buckets[0])
    wait(lambda: list(root.iterdir()) == [] or sender.send(buckets[0]) is not None, "the reader to connect")
    sender.close()
    reader.join(SECONDS)
    assert "hung up 5000 bytes before the end" in str(reader.error)


@pytest.mark.parametrize("connected", [False, True])
def test_a_silent_trainer_is_an_error_when_the_lease_is_over(root: Path, connected: bool) -> None:
    buckets = buckets_of(300)
    sender = sender_of(root, buckets) if connected else None
    with pytest.raises(TransportError, match=r"sent nothing for 0\.05 s"):
        list(shm.fetch("shm:", arrivals_of(buckets, lease=0.05), root))
    if sender is not None:
        sender.close()


def test_an_update_that_is_aborted_is_read_no_further(root: Path) -> None:
    buckets = buckets_of(300)
    sender = sender_of(root, buckets)
    reader = Reader(root, arrivals_of(buckets))
    reader.arrivals.cancelled.set()
    reader.join(SECONDS)
    assert "aborted" in str(reader.error)
    assert list(root.iterdir()) == []  # swept by the engine
    sender.close()


def test_an_engine_that_went_is_asked_why(root: Path) -> None:
    buckets = buckets_of(300, 8 << 20)
    sender = sender_of(root, buckets, wait=refuse)
    reader = shm.fetch("shm:", arrivals_of(buckets), root)
    first = threading.Thread(target=lambda: next(reader))
    first.start()
    fill(sender, buckets[:1], random(buckets[:1]))
    while first.is_alive():
        sender.send(buckets[0])
    reader.close()
    with pytest.raises(TransportError, match="to say why it ended"):
        fill(sender, buckets[1:], random(buckets[1:]))
    sender.close()


def test_an_engine_that_never_comes_is_waited_for_as_long_as_the_caller_likes(root: Path) -> None:
    buckets = buckets_of(300)
    sender = sender_of(root, buckets, wait=refuse)
    fill(sender, buckets, random(buckets))
    with pytest.raises(TransportError, match="last buckets to be read"):
        sender.finish()
    sender.close()


def test_a_folder_whose_path_is_longer_than_a_sockets_may_be(tmp_path: Path) -> None:
    root = tmp_path / ("x" * 120)
    root.mkdir()
    buckets = buckets_of(5000)
    reader = Reader(root, arrivals_of(buckets))
    sender = sender_of(root, buckets)
    fill(sender, buckets, sent := random(buckets))
    sender.finish()
    sender.close()
    reader.join(SECONDS)
    assert torch.equal(reader.got[0], sent[0])


def test_a_name_that_is_taken_leaves_nothing_of_the_others(root: Path) -> None:
    links = [Link(engine=name, update=name * 32, ranks=1, put=lambda *_: None) for name in "ab"]
    taken = root / f"weightwire-{'b' * 32}-socket-early"
    taken.touch()
    with pytest.raises(TransportError, match="no socket can be put into"):
        shm.Shm(root).sender(links, buckets_of(300), wait, SECONDS)


def test_a_name_that_is_no_socket_is_an_error(root: Path) -> None:
    name = shm._socket(root, UPDATE)
    name.touch()
    with pytest.raises(TransportError, match="cannot be reached"):
        list(shm.fetch("shm:", arrivals_of(buckets_of(300)), root))
    name.unlink()


@pytest.mark.parametrize("said", [b"", b"\x01", bytes(8), bytes(16)])
def test_a_trainer_that_hands_over_no_memory(root: Path, said: bytes) -> None:
    buckets = buckets_of(300)
    with socket.socket(socket.AF_UNIX) as door:
        with unix_socket._short(shm._socket(root, UPDATE)) as path:
            door.bind(path)
        door.listen()
        reader = Reader(root, arrivals_of(buckets))
        with door.accept()[0] as connection:
            connection.sendall(said)
        reader.join(SECONDS)
        assert "handed over no memory" in str(reader.error)
        shm._socket(root, UPDATE).unlink()


def test_more_files_than_select_can_take(root: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("this process may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    pairs = [socket.socketpair() for _ in range(530)]
    try:
        buckets = buckets_of(5000)
        reader = Reader(root, arrivals_of(buckets))
        sender = sender_of(root, buckets)
        fill(sender, buckets, random(buckets))
        sender.finish()
        sender.close()
        reader.join(SECONDS)
        assert reader.got.keys() == {0}
    finally:
        for pair in pairs:
            for each in pair:
                each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

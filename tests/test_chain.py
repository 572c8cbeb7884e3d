"""Engines that missed some updates: brought on by one delta that does what they all do, or by everything."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import weightwire as ww
from support import same, snapshot, tiny
from support.server import serve
from weightwire import chain
from weightwire.chain import Chain
from weightwire.errors import EngineLost
from weightwire.updates.delta import Delta, Patch, decode, encode

pytestmark = pytest.mark.usefixtures("shm_root", "no_threads_left")


@pytest.fixture
def pair() -> Iterator[list[ww.TransformersEngine]]:
    made = [ww.TransformersEngine(tiny(torch.bfloat16, width=256), name=name) for name in "ab"]
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in snapshot(tiny(torch.bfloat16, width=256)).items()}


def moved(weights: dict[str, torch.Tensor], seed: int, density: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.values():
        chosen = torch.rand(tensor.shape, generator=generator) < density
        tensor[chosen] *= 1.5


@contextlib.contextmanager
def failing(engine: ww.TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commits of deltas fail on this engine half-way, which puts the old weights back."""
    apply = Patch.apply
    own = {parameter.data_ptr() for parameter in engine.model.parameters()}
    done: list[int] = []

    def breaks(patch: Patch, live: torch.Tensor) -> None:
        apply(patch, live)
        if live.data_ptr() in own:
            done.append(live.data_ptr())
            if len(done) % 2 == 0:
                raise RuntimeError("it broke")

    with monkeypatch.context() as patched:
        patched.setattr(Patch, "apply", breaks)
        yield


def leave_behind(
    publisher: ww.Publisher, pair: Any, weights: Any, monkeypatch: pytest.MonkeyPatch, *versions: int
) -> None:
    """Both engines get version 4, and only the first of them those after it."""
    publisher.publish(4)
    with failing(pair[1], monkeypatch):
        for version in versions:
            moved(weights, version)
            with pytest.raises(ww.PublishError):
                publisher.publish(version)


def versions(engines: list[ww.TransformersEngine]) -> list[int | None]:
    return [engine.status().version for engine in engines]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_an_engine_that_missed_updates_gets_them_as_one_delta(
    pair: Any, weights: Any, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ww.Publisher(weights, pair, baseline="host", transport=transport) as publisher:
        publisher.publish(4)
        old = snapshot(pair[1].model)
        with failing(pair[1], monkeypatch):
            for version in (5, 6):
                moved(weights, version)
                with pytest.raises(ww.PublishError, match="1 of 2 engines did not commit"):
                    publisher.publish(version)
                assert same(pair[0].model, weights)
                assert same(pair[1].model, old)
        assert versions(pair) == [6, 4]
        moved(weights, 7)
        receipt = publisher.publish(7, kind="delta")
        assert (receipt.kind, versions(pair)) == ("delta", [7, 7])
        assert all(same(engine.model, weights) for engine in pair)
        assert receipt.why.endswith("MB; b: delta from 4 through 3 deltas")
        one, three = (receipt.engines[name].nbytes for name in "ab")
        assert one < three == receipt.nbytes < sum(tensor.nbytes for tensor in weights.values()) / 2
        moved(weights, 8)
        receipt = publisher.publish(8)
        assert (receipt.kind, "through" in receipt.why) == ("delta", False)
        assert all(same(engine.model, weights) for engine in pair)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_engines_at_three_versions_each_get_what_they_missed(
    pair: Any, weights: Any, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(ww.TransformersEngine(tiny(torch.bfloat16, width=256), name="c")) as third:
        engines = [*pair, third]
        with ww.Publisher(weights, engines, baseline="host", transport=transport) as publisher:
            publisher.publish(4)
            for version, missing in ((5, [pair[1], third]), (6, [third]), (7, [pair[1], third])):
                moved(weights, version)
                with contextlib.ExitStack() as stack:
                    for engine in missing:
                        stack.enter_context(failing(engine, monkeypatch))
                    with pytest.raises(ww.PublishError):
                        publisher.publish(version)
            assert versions(engines) == [7, 6, 4]
            moved(weights, 8)
            publisher.publish(8, kind="delta")
            assert versions(engines) == [8, 8, 8]
            assert all(same(engine.model, weights) for engine in engines)


def test_what_missed_more_than_is_kept_gets_everything(
    pair: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "_SHARE", 1e-3)
    with ww.Publisher(weights, pair, baseline="host") as publisher:
        leave_behind(publisher, pair, weights, monkeypatch, 5)
        moved(weights, 6)
        with pytest.raises(ww.UsageError, match="b serves 4, from where no deltas that are kept lead on"):
            publisher.publish(6, kind="delta")
        receipt = publisher.publish(6)
        assert (receipt.kind, receipt.why[:10]) == ("dense", "b serves 4")
        assert all(same(engine.model, weights) for engine in pair)


def test_a_dense_update_breaks_the_chain(pair: Any, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ww.Publisher(weights, pair, baseline="host") as publisher:
        leave_behind(publisher, pair, weights, monkeypatch, 5)
        commit = pair[1].commit
        monkeypatch.setattr(pair[1], "commit", lost)
        moved(weights, 6)
        with pytest.raises(ww.PublishError, match="gone"):
            publisher.publish(6, kind="dense")
        monkeypatch.setattr(pair[1], "commit", commit)
        forget(pair[1])
        moved(weights, 7)
        assert versions(pair) == [6, 4]
        assert publisher.publish(7).kind == "dense"
        assert all(same(engine.model, weights) for engine in pair)


def forget(engine: ww.TransformersEngine) -> None:
    update = engine.status().update
    assert update is not None
    engine.abort(update["id"], timeout=30)


def lost(*_: Any, **__: Any) -> Any:
    raise EngineLost("gone")


def test_a_publish_that_fails_before_its_commit_forgets_nobody_behind(
    pair: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ww.Publisher(weights, pair, baseline="host") as publisher:
        leave_behind(publisher, pair, weights, monkeypatch, 5)
        seal = pair[0].seal
        monkeypatch.setattr(pair[0], "seal", lost)
        with pytest.raises(EngineLost):
            publisher.publish(6)
        monkeypatch.setattr(pair[0], "seal", seal)
        assert versions(pair) == [5, 4]
        assert "b: delta from 4 through 2 deltas" in publisher.publish(6, kind="delta").why
        assert all(same(engine.model, weights) for engine in pair)


def test_what_was_half_overwritten_is_no_base(pair: Any, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ww.Publisher(weights, pair, baseline="host") as publisher:
        leave_behind(publisher, pair, weights, monkeypatch, 5)
        with monkeypatch.context() as patched:
            patched.setattr(pair[0], "seal", lost)
            with pytest.raises(EngineLost):
                publisher.publish(6, kind="dense")
        assert publisher.publish(6).kind == "dense"
        moved(weights, 7)
        assert publisher.publish(7).kind == "delta"
        assert all(same(engine.model, weights) for engine in pair)


@pytest.mark.parametrize("reached", [True, False])
def test_a_commit_whose_answer_is_lost(pair: Any, weights: Any, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pair[0]
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(4)
        commit: Callable[..., Any] = engine.commit

        def forgets(*args: Any, **options: Any) -> Any:
            return lost(commit(*args, **options) if reached else None)

        monkeypatch.setattr(engine, "commit", forgets)
        moved(weights, 5)
        with pytest.raises(EngineLost):
            publisher.publish(5)
        monkeypatch.setattr(engine, "commit", commit)
        if not reached:
            forget(engine)
        moved(weights, 6)
        receipt = publisher.publish(6, kind="delta")
        assert (receipt.kind, "through" in receipt.why) == ("delta", False)
        assert same(engine.model, weights)


def test_where_all_engines_are_behind_they_get_the_same(
    pair: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ww.Publisher(weights, pair, baseline="host") as publisher:
        leave_behind(publisher, pair, weights, monkeypatch, 5, 6)
        publisher._means.engines = (pair[1],)  # as if the other were no more
        moved(weights, 7)
        receipt = publisher.publish(7, kind="delta")
        assert receipt.why.endswith("; b: delta from 4 through 2 deltas")
        assert receipt.nbytes == receipt.engines["b"].nbytes
        assert same(pair[1].model, weights)


def test_over_http_an_engine_catches_up_too(pair: Any, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    near, behind = pair
    with serve(behind, token="secret") as server, ww.connect([near, server.url], token="secret") as engines:
        with ww.Publisher(weights, engines, baseline="host") as publisher:
            publisher.publish(1)
            with failing(behind, monkeypatch):
                moved(weights, 2)
                with pytest.raises(ww.PublishError):
                    publisher.publish(2)
            moved(weights, 3)
            assert "delta from 1 through 2 deltas" in publisher.publish(3, kind="delta").why
        assert all(same(engine.model, weights) for engine in pair)


# -- the chain itself ----------------------------------------------------------------------------------------------


def steps(count: int) -> tuple[list[torch.Tensor], list[list[Delta]]]:
    states = [torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16()]
    for seed in range(count):
        following = {"w": states[-1].clone()}
        moved(following, seed)
        states.append(following["w"])
    return states, [[encode("w", old, new)] for old, new in itertools.pairwise(states)]


def test_it_leads_on_from_each_version_that_it_has() -> None:
    states, deltas = steps(4)
    kept = Chain()
    for version in range(3):
        kept.add(10 * version, deltas[version])
    for number in range(3):
        found = kept.since(10 * number, deltas[3])
        assert found is not None
        assert found[0] == 4 - number
        patch = decode("w", found[1][0], states[number])
        patch.apply(states[number])
        assert torch.equal(states[number], states[4])
    assert [kept.since(version, deltas[3]) for version in (5, 30, 99)] == [None, None, None]
    kept.clear()
    assert (kept.nbytes, kept.since(0, deltas[3])) == (0, None)


def test_its_memory_is_bounded_and_the_oldest_goes_first() -> None:
    _, deltas = steps(40)
    kept = Chain()
    for version, step in enumerate(deltas[:-1]):
        kept.add(version, step)
        assert kept.nbytes <= 10_000 * chain._SHARE
    assert kept.since(38, deltas[-1]) is not None
    assert kept.since(0, deltas[-1]) is None

"""Updates as deltas: bit for bit what the dense update is, refused where the base is another, undone where it fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightwire as ww
from support import same, snapshot, tiny
from support.cases import cases
from support.server import serve
from weightwire.baseline import Baseline
from weightwire.engines.control import Control
from weightwire.engines.staged_delta import StagedDelta
from weightwire.engines.vllm.layout import Slot
from weightwire.engines.vllm.rebuilt import HostCopy, Rebuilt
from weightwire.errors import ManifestError
from weightwire.receiver import Arrivals, Receiver
from weightwire.sources.base import spec_of
from weightwire.updates.delta import Patch, encode
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Manifest, TensorSpec, decode_manifest

pytestmark = pytest.mark.usefixtures("shm_root", "no_threads_left")
SECONDS = 60.0


@pytest.fixture
def engine_of() -> Iterator[Callable[..., ww.TransformersEngine]]:
    made: list[ww.TransformersEngine] = []

    def make(dtype: torch.dtype = torch.bfloat16, name: str = "here", width: int = 64) -> ww.TransformersEngine:
        made.append(ww.TransformersEngine(tiny(dtype, width=width), name=name))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def moved(weights: dict[str, torch.Tensor], density: float, seed: int) -> None:
    """A step: about so many elements of each tensor change."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.values():
        chosen = torch.rand(tensor.shape, generator=generator) < density
        tensor[chosen] *= 1.01


def first(engine: ww.TransformersEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in snapshot(engine.model).items()}


# -- what goes well ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_delta_follows_a_dense_update_and_the_receipt_says_why(
    engine_of: Any, transport: str, dtype: torch.dtype
) -> None:
    engine = engine_of(dtype)
    weights = first(engine)
    dense = sum(tensor.nbytes for tensor in weights.values())
    with ww.Publisher(weights, engine, baseline="host", transport=transport) as publisher:
        receipt = publisher.publish(4)
        assert (receipt.kind, receipt.nbytes) == ("dense", dense)
        assert "nothing was published before" in receipt.why
        for version in (5, 6, 9):
            moved(weights, 0.01, version)
            receipt = publisher.publish(version)
            assert same(engine.model, weights)
            assert receipt.kind == "delta"
            assert receipt.nbytes < dense / 2
            assert "% of the elements changed, instead of" in receipt.why
            assert "encode" in receipt.seconds
            mine = receipt.engines["here"]
            assert (mine.kind, mine.nbytes, mine.version) == ("delta", receipt.nbytes, version)
            assert mine.proven == dict.fromkeys(weights, "read back")
            assert mine.digests == {name: scan(tensor).digest.hex() for name, tensor in weights.items()}
            assert engine.status().version == version


def test_over_http_only_the_delta_travels(engine_of: Any) -> None:
    engine = engine_of(width=256)
    weights = first(engine)
    with serve(engine, token="secret") as server, ww.connect(server.url, token="secret") as far:
        sent: list[int] = []
        far[0]._client.event_hooks = {"request": [lambda request: sent.append(len(request.read()))]}
        with ww.Publisher(weights, far, baseline="host", transport="http") as publisher:
            publisher.publish(1)
            dense = sum(sent)
            sent.clear()
            moved(weights, 0.001, 2)
            assert publisher.publish(2).kind == "delta"
            assert same(engine.model, weights)
            assert sum(sent) < dense / 50
            with ww.Publisher(first(engine), engine) as other:
                other.publish(3)
            assert "the delta starts from version 2, here is 3" in publisher.publish(4).why
            assert same(engine.model, weights)


def test_what_did_not_change_at_all_is_a_delta_too(engine_of: Any) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(1)
        receipt = publisher.publish(2)
    assert (receipt.kind, receipt.nbytes) == ("delta", 96 * len(weights))
    assert same(engine.model, weights)


def test_dense_is_sent_where_that_is_smaller(engine_of: Any) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(1)
        for tensor in weights.values():
            tensor.normal_()
        receipt = publisher.publish(2)
        assert receipt.kind == "dense"
        assert "of the elements changed, more than the 20% up to which deltas pay" in receipt.why
        assert same(engine.model, weights)
        moved(weights, 0.01, 3)
        assert publisher.publish(3).kind == "delta"
        assert publisher.publish(4, kind="dense").kind == "dense"
        for tensor in weights.values():
            tensor.normal_()
        assert publisher.publish(5, kind="delta").kind == "delta"
        assert same(engine.model, weights)


def test_a_baseline_on_a_gpu_wants_the_weights_on_one(engine_of: Any) -> None:
    engine = engine_of()
    with pytest.raises(ww.UnsupportedError, match=r"baseline='device': .* is on cpu"):
        ww.Publisher(first(engine), engine, baseline="device")


def test_without_a_baseline_everything_is_sent(engine_of: Any) -> None:
    engine = engine_of()
    with ww.Publisher(first(engine), engine) as publisher:
        assert [publisher.publish(v).kind for v in (1, 2)] == ["dense", "dense"]
        with pytest.raises(ww.UsageError, match="baseline='host'"):
            publisher.publish(3, kind="delta")


@settings(max_examples=cases(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(["auto", "dense", "delta"]), st.integers(0, 999)), max_size=6))
def test_any_mix_of_updates_leaves_engine_and_trainer_equal(engine_of: Any, steps: list[tuple[Any, int]]) -> None:
    engine = engine_of(width=8)
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(0)
        for version, (kind, seed) in enumerate(steps, 1):
            moved(weights, [0.0, 0.02, 0.5, 1.0][seed % 4], seed)
            weights["0.weight"][seed % 8, 0] = [-0.0, 0.0, 1e-40, -3.0][seed % 4]
            publisher.publish(version, kind=kind)
            assert same(engine.model, weights)


def test_a_base_whose_tensors_come_in_another_order_is_one(engine_of: Any) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine) as publisher:
        publisher.publish(6)
    last = {name: weights[name].clone() for name in reversed(weights)}
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.start_from(last, version=6)
        moved(weights, 0.01, 7)
        assert publisher.publish(7, kind="delta").kind == "delta"
    assert same(engine.model, weights)


# -- another base --------------------------------------------------------------------------------------------------


def test_an_engine_at_another_version_refuses_and_gets_everything(engine_of: Any) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher, ww.Publisher(first(engine), engine) as other:
        publisher.publish(4)
        other.publish(5)
        held = snapshot(engine.model)
        moved(weights, 0.01, 6)
        with pytest.raises(ww.VersionError, match="the delta starts from version 4, here is 5"):
            publisher.publish(6, kind="delta")
        assert same(engine.model, held)
        receipt = publisher.publish(6)
        assert receipt.kind == "dense"
        assert "the delta was refused: here: begin: the delta starts from version 4, here is 5" in receipt.why
        assert same(engine.model, weights)
        moved(weights, 0.01, 7)
        assert publisher.publish(7).kind == "delta"


def test_live_weights_that_are_not_the_base_are_refused_by_name_and_healed(engine_of: Any) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(1)
        with torch.no_grad():
            engine.model[1].weight[3, 3] += 1
        held = snapshot(engine.model)
        moved(weights, 0.01, 2)
        with pytest.raises(ww.VersionError, match=r"seal: '1\.weight': the delta starts from elements of digest"):
            publisher.publish(2, kind="delta")
        assert same(engine.model, held)
        assert (engine.status().state, engine.status().version) == ("idle", 1)
        assert "'1.weight'" in publisher.publish(2).why
        assert same(engine.model, weights)


def test_a_poisoned_engine_gets_everything_and_is_healed(engine_of: Any) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(1)
        engine.receiver.poison("the bus is on fire")
        moved(weights, 0.01, 2)
        with pytest.raises(ww.PoisonedError, match="a delta cannot heal it"):
            publisher.publish(2, kind="delta")
        receipt = publisher.publish(2)
        assert (receipt.kind, engine.status().state) == ("dense", "idle")
        assert same(engine.model, weights)


def test_one_engine_of_two_without_the_base_makes_it_dense_for_both(engine_of: Any) -> None:
    pair = [engine_of(name="a"), engine_of(name="b")]
    weights = first(pair[0])
    with ww.Publisher(weights, pair, baseline="host") as publisher, ww.Publisher(first(pair[1]), pair[1]) as other:
        publisher.publish(1)
        other.publish(2)
        moved(weights, 0.01, 3)
        assert publisher.publish(3).kind == "dense"
        assert all(same(engine.model, weights) for engine in pair)


def test_an_engine_of_another_dtype_gets_everything(engine_of: Any) -> None:
    engine = engine_of(torch.float32)
    weights = {name: tensor.bfloat16() for name, tensor in first(engine).items()}
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(1)
        moved(weights, 0.01, 2)
        receipt = publisher.publish(2)
        assert receipt.kind == "dense"
        assert "and a delta needs it as contiguous bfloat16" in receipt.why
        assert same(engine.model, {name: tensor.float() for name, tensor in weights.items()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_unless_asked_for(engine_of: Any, bad: float) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(1)
        held = snapshot(engine.model)
        weights["0.weight"][2, 2] = bad
        with pytest.raises(ww.NonFinite, match=r"0\.weight"):
            publisher.publish(2)
        assert same(engine.model, held)
        assert publisher.publish(2, finite=False).kind == "delta"
        assert same(engine.model, weights)


# -- harm on the way, and a commit that fails ----------------------------------------------------------------------


class Rank:
    """A rank's model: one tensor, which takes deltas. `breaks` says where its commit fails."""

    adapter_dtype = None

    def __init__(self, live: torch.Tensor) -> None:
        self.live = live.clone()
        self.breaks: str | None = None

    def prepare_delta(self, manifest: Manifest) -> StagedDelta:
        staged = StagedDelta(manifest, [{"w": self.live}])
        if self.breaks == "undo":
            staged.undo = fails  # type: ignore[method-assign]
        return staged

    def room(self) -> int:
        return 1 << 20


def fails() -> None:
    raise RuntimeError("it broke")


class Host:
    """An engine of several ranks, which are handed one delta's bytes."""

    name = model = "fake"
    idle = alone = in_order = False

    def __init__(self, ranks: int, base: torch.Tensor, data: torch.Tensor) -> None:
        self.ranks = [Rank(base) for _ in range(ranks)]
        self.data = data
        self.receivers = [Receiver(rank, self.fetch, rank=i) for i, rank in enumerate(self.ranks)]
        for receiver in self.receivers:
            receiver._version = 4
        self.paused = False
        self.refusal: str | None = None
        self.labels: Callable[[], None] = lambda: None

    def fetch(self, address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
        for bucket in arrivals.buckets:
            (piece,) = bucket.pieces
            yield bucket.index, self.data[piece.start : piece.start + piece.count]

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        return [await asyncio.to_thread(receiver.handle, op, arguments, body) for receiver in self.receivers]

    async def before_pause(self) -> None:
        pass

    async def pause(self, mode: str, keep_cache: Any) -> None:
        self.paused = True

    async def resume(self) -> None:
        self.paused = False

    async def refuse(self, reason: str) -> None:
        self.refusal = reason

    async def label(self, version: int) -> None:
        self.labels()

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()

    def versions(self) -> set[int | None]:
        return {receiver.status()["version"] for receiver in self.receivers}

    def holds(self, weights: torch.Tensor) -> bool:
        return all(torch.equal(rank.live.view(torch.int16), weights.view(torch.int16)) for rank in self.ranks)


def step() -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.randn(3000, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights = {"w": base.clone()}
    moved(weights, 0.02, 2)
    weights["w"][7] = -0.0
    return base, weights["w"]


def manifest_of(nbytes: int, **changes: Any) -> Manifest:
    spec = TensorSpec(name="w", dtype="bfloat16", shape=(3000,))
    plain = {"version": 5, "kind": "delta", "base_version": 4, "tensors": (spec,), "encoded": (nbytes,)}
    return Manifest(**{**plain, "bucket_bytes": 4096, **changes})


async def put(host: Host) -> Any:
    control = Control(host)  # type: ignore[arg-type]
    id = (await control.begin(manifest_of(host.data.numel()), "trainer", SECONDS, SECONDS)).id
    try:
        await control.stage(id, "test:", SECONDS)
        await control.seal(id, [scan(host.data).digest.hex()], SECONDS)
        return await control.commit(id, "keep", False, SECONDS)
    finally:
        await control.abort(id, SECONDS)


@pytest.fixture
def host() -> Iterator[Host]:
    base, new = step()
    made = Host(3, base, encode("w", base, new).data)
    yield made
    made.close()


def test_every_rank_takes_it_and_reads_it_back(host: Host) -> None:
    _, new = step()
    receipt = asyncio.run(put(host))
    assert host.holds(new)
    assert (receipt.kind, receipt.proven) == ("delta", {"w": "read back"})
    assert receipt.digests == {"w": scan(new).digest.hex()}
    assert host.versions() == {5}


def test_harm_that_every_digest_on_the_way_agrees_to_changes_nothing(host: Host) -> None:
    # As a trainer's memory might do it, between the encoder and the first digest that is taken for the way.
    base, _ = step()
    whole = host.data.clone()
    for place in range(0, whole.numel(), 7):
        host.data = whole.clone()
        host.data[place] ^= 0x10
        with pytest.raises(ww.VerificationError, match="'w': not a whole delta"):
            asyncio.run(put(host))
        assert host.holds(base)
        assert host.versions() == {4}
    host.data = whole
    asyncio.run(put(host))


def test_applied_twice_it_is_refused(host: Host) -> None:
    _, new = step()
    asyncio.run(put(host))
    for receiver in host.receivers:
        receiver._version = 4  # as if it had forgotten: its weights still know
    with pytest.raises(ww.VersionError, match="'w': the delta starts from elements of digest"):
        asyncio.run(put(host))
    assert host.holds(new)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "midway", "after"])
def test_one_rank_that_fails_in_the_commit_gives_all_the_old_version_back(
    host: Host, rank: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = step()
    apply = Patch.apply

    def breaks(patch: Patch, live: torch.Tensor) -> None:
        if live is not host.ranks[rank].live:
            return apply(patch, live)
        if when == "midway":
            half = patch.indices[: patch.indices.numel() // 2]
            live[half] = patch.new[: half.numel()]
        if when == "after":
            apply(patch, live)
        raise RuntimeError("it broke")

    with monkeypatch.context() as patched:
        patched.setattr(Patch, "apply", breaks)
        with pytest.raises(ww.EngineError, match=f"the commit failed on rank {rank}, which has its old weights back"):
            asyncio.run(put(host))
    assert host.holds(base)
    assert (host.versions(), host.paused, host.refusal) == ({4}, False, None)
    assert {receiver.status()["state"] for receiver in host.receivers} == {"idle"}
    asyncio.run(put(host))
    assert host.holds(new)


def test_a_label_that_fails_after_the_commit_gives_the_old_version_back(host: Host) -> None:
    base, _ = step()
    host.labels = fails
    with pytest.raises(RuntimeError, match="it broke"):
        asyncio.run(put(host))
    assert host.holds(base)
    assert (host.versions(), host.paused, host.refusal) == ({4}, False, None)


def test_what_cannot_be_undone_is_poisoned(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.ranks[1].breaks = "undo"
    with monkeypatch.context() as patched:
        patched.setattr(Patch, "apply", lambda patch, live: fails() if live is host.ranks[1].live else None)
        with pytest.raises(ww.PoisonedError, match="it broke"):
            asyncio.run(put(host))
    assert host.refusal is not None
    with pytest.raises(ww.PoisonedError, match="a delta cannot heal it"):
        asyncio.run(put(host))


def test_a_failed_commit_is_undone_in_a_model_and_the_next_delta_fits(
    engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    weights = first(engine)
    with ww.Publisher(weights, engine, baseline="host") as publisher:
        publisher.publish(1)
        held = snapshot(engine.model)
        moved(weights, 0.05, 2)
        calls = threading.local()

        def breaks(patch: Patch, live: torch.Tensor) -> None:
            calls.count = getattr(calls, "count", 0) + 1
            live.view(-1)[patch.indices] = patch.new
            if calls.count == 3:
                raise RuntimeError("it broke")

        with monkeypatch.context() as patched:
            patched.setattr(Patch, "apply", breaks)
            with pytest.raises(ww.EngineError, match="which has its old weights back") as caught:
                publisher.publish(2)
        assert caught.value.phase == "commit"
        assert same(engine.model, held)
        engine.model(torch.zeros(1, 64, dtype=torch.bfloat16))
        assert publisher.publish(2).kind == "delta"
        assert same(engine.model, weights)


class Packing:
    """What `Rebuilt` needs of a vLLM rank's dense update: modules whose parameters are handed over at commit."""

    nbytes = 0
    takes = None

    def __init__(self, slots: list[Slot], breaks: int) -> None:
        self._slots = slots
        self._breaks = breaks

    def write(self, tensor: int, start: int, data: torch.Tensor) -> None:
        self._new = data.clone().reshape(4, 3)

    def seal(self, scans: object) -> None:
        for slot in self._slots:
            slot.prepare({"w": self._new}, finite=True)

    def commit(self) -> None:
        for number, slot in enumerate(self._slots):
            if number == self._breaks:
                raise RuntimeError("it broke")
            slot.commit()

    def proof(self) -> dict[str, str]:
        return {"w": "read back"}

    def discard(self) -> None:
        pass


@pytest.mark.parametrize("breaks", [0, 1, 2])
def test_a_weight_that_modules_share_is_the_old_one_again_when_undone(breaks: int) -> None:
    embed, head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
    head.weight = embed.weight
    old = embed.weight.detach().clone()
    slots = [Slot(module, {"weight": "w"}) for module in (embed, head)]
    host = HostCopy([spec_of("w", old)])
    host.tensors[0].copy_(old.reshape(-1))
    host.whole = True
    delta = encode("w", old, old + 1)
    manifest = manifest_of(delta.nbytes, tensors=host.specs)
    rebuilt = Rebuilt(manifest, Packing(slots, breaks), slots, host)
    rebuilt.write(0, 0, delta.data)
    rebuilt.seal([])
    if breaks < 2:
        with pytest.raises(RuntimeError):
            rebuilt.commit()
    else:
        rebuilt.commit()
        assert torch.equal(embed.weight, old + 1)
        assert torch.equal(host.tensors[0], (old + 1).reshape(-1))
    rebuilt.undo()
    assert torch.equal(embed.weight, old)
    assert head.weight is embed.weight
    assert torch.equal(host.tensors[0], old.reshape(-1))
    assert host.whole


# -- manifests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"base_version": None}, "base version None"),
        ({"kind": "dense"}, "base version 4"),
        ({"kind": "dense", "base_version": None}, "with sizes of deltas"),
        ({"encoded": ()}, "0 sizes of deltas for 1 tensors"),
        ({"encoded": (200, 200)}, "2 sizes of deltas for 1 tensors"),
        ({"encoded": (1 << 40,)}, "a delta of 1099511627776 bytes for 6000"),
        ({"partial": True}, "is of a whole model"),
        ({"staging": "none"}, "is staged as it is"),
        ({"tensors": (TensorSpec(name="w", dtype="int8", shape=(3000,)),)}, "'int8', of which there is no delta"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        manifest_of(200, **changes).check()


def test_a_manifest_of_a_delta_travels_as_json() -> None:
    import msgspec

    manifest = manifest_of(200)
    assert decode_manifest(msgspec.json.encode(manifest)) == manifest
    assert (manifest.nbytes, manifest.wire[0].dtype, manifest.wire[0].shape) == (200, "uint8", (200,))


# -- the baseline --------------------------------------------------------------------------------------------------


def baseline_of(**tensors: torch.Tensor) -> Baseline:
    made = Baseline()
    made.start(tuple(spec_of(name, tensor) for name, tensor in tensors.items()))
    for number, tensor in enumerate(tensors.values()):
        made.write(number, 0, tensor)
    made.finish(1, [scan(tensor) for tensor in tensors.values()])
    return made


def reader(*tensors: torch.Tensor) -> Any:
    def read(number: int, start: int, out: torch.Tensor) -> Any:
        out.copy_(tensors[number].reshape(-1)[start : start + out.numel()])
        return scan(out, start)

    return read


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_the_sampled_density_is_near_the_true_one(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    base = {"w": torch.randn(300, 400, generator=generator), "b": torch.randn(7, generator=generator)}
    new = {name: tensor.clone() for name, tensor in base.items()}
    chosen = torch.rand(300, 400, generator=generator) < share
    new["w"][chosen] += 1
    assert baseline_of(**base).look(reader(*new.values())).density == pytest.approx(share, abs=0.03)


def test_no_elements_have_no_density() -> None:
    assert baseline_of(w=torch.zeros(0)).look(reader(torch.zeros(0))).density == 0.0


def test_a_baseline_that_is_harmed_is_noticed_by_the_trainer() -> None:
    base = torch.randn(500)
    baseline = baseline_of(w=base)
    baseline._tensors[0][3] += 1
    with pytest.raises(ww.WeightwireError, match="w: what was published last is no longer what is kept of it"):
        baseline.encode(reader(base), finite=True)

"""LoRA adapters of which only what changed is sent: bit for bit what they are when sent whole, or refused by name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

import weightwire as ww
from support import tiny
from support.server import serve
from weightwire.engines.control import Control
from weightwire.engines.staged_adapter import StagedAdapter
from weightwire.engines.transformers import ModuleTarget
from weightwire.engines.transformers_adapters import ModuleAdapters
from weightwire.errors import EngineError, ManifestError
from weightwire.receiver import Arrivals, Receiver
from weightwire.revisions import Revision
from weightwire.sources.base import spec_of
from weightwire.sources.peft import AdapterSource
from weightwire.updates.buckets import cut
from weightwire.updates.delta import Delta, encode
from weightwire.updates.digest import scan
from weightwire.updates.manifest import Adapter, Manifest, decode_manifest

pytestmark = pytest.mark.usefixtures("shm_root", "no_threads_left")
SECONDS = 60.0
WIDTH, RANK = 256, 8
CONFIG: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "target_modules": ["0", "1"], "peft_type": "LORA"}
INPUT = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))

Tensors = dict[str, torch.Tensor]


def adapter_of(seed: int = 1, rank: int = RANK, dtype: torch.dtype = torch.float32) -> Tensors:
    """An adapter of `tiny`, of random weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, WIDTH), "B": (WIDTH, rank)}
    return {
        f"base_model.model.{module}.lora_{part}.weight": torch.randn(shape, generator=generator).to(dtype)
        for module in (0, 1)
        for part, shape in shapes.items()
    }


def moved(tensors: Tensors, seed: int, density: float = 0.02) -> None:
    """A step: about so many elements of each tensor change."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor[torch.rand(tensor.shape, generator=generator) < density] *= 1.5


@pytest.fixture
def engine_of() -> Iterator[Callable[..., ww.TransformersEngine]]:
    made: list[ww.TransformersEngine] = []

    def make(name: str = "here") -> ww.TransformersEngine:
        torch.manual_seed(0)
        made.append(ww.TransformersEngine(tiny(width=WIDTH), name=name))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def publisher_of(tensors: Tensors, engines: Any, config: Any = CONFIG, **how: Any) -> ww.Publisher:
    return ww.Publisher(AdapterSource(tensors, config), engines, **{"baseline": "host", **how})


def outputs(engine: ww.TransformersEngine, name: str = "policy") -> torch.Tensor:
    with engine.adapter(name), torch.no_grad():
        return engine.model(INPUT)


def versions(engine: Any) -> list[int]:
    return [version for each in engine.status().adapters for version in each["versions"]]


@pytest.fixture
def serves(engine_of: Any) -> Callable[..., bool]:
    """Whether an engine computes and holds what another does that was sent these tensors whole."""
    twin: list[ww.TransformersEngine] = []

    def check(engine: Any, receipt: ww.Receipt | None, tensors: Tensors, config: Any = CONFIG) -> bool:
        twin[:] = twin or [engine_of("twin")]
        sent = ww.Engines(twin).adapters.load("policy", tensors, config).engines["twin"]
        mine = sent if receipt is None else receipt.engines[engine.name]
        told = (mine.digests, mine.held, mine.proven) == (sent.digests, sent.held, sent.proven)
        return told and torch.equal(outputs(engine), outputs(twin[0]))

    return check


# -- what goes well ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deltas_follow_each_other_and_equal_what_is_sent_whole(
    engine_of: Any, serves: Any, transport: str, dtype: torch.dtype
) -> None:
    engine, tensors = engine_of(), adapter_of(dtype=dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with publisher_of(tensors, engine, transport=transport) as publisher:
        receipt = publisher.publish(4)
        assert (receipt.nbytes, receipt.why[:38]) == (size, "whole: nothing was published before th")
        for version in (5, 6, 9, 10, 11):
            moved(tensors, version)
            receipt = publisher.publish(version)
            assert receipt.why.startswith("delta: "), receipt.why
            assert "% of the elements changed, instead of" in receipt.why
            assert receipt.nbytes < size / 8
            assert "encode" in receipt.seconds
            mine = receipt.engines["here"]
            assert (mine.adapter, mine.kind, mine.nbytes) == (f"policy@{version}", "adapter", receipt.nbytes)
            assert mine.digests == {name: scan(tensor).digest.hex() for name, tensor in tensors.items()}
            assert serves(engine, receipt, tensors)
        assert versions(engine) == [9, 10, 11]
    assert engine.status().version is None


def test_a_float32_adapter_is_compared_in_the_dtype_it_travels_in(
    engine_of: Any, serves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModuleTarget, "adapter_dtype", "bfloat16")
    engine, tensors = engine_of(), adapter_of()
    with publisher_of(tensors, engine) as publisher:
        whole = publisher.publish(1)
        for tensor in tensors.values():
            tensor += 1e-6 * tensor  # most of which bfloat16 does not see
        moved(tensors, 2, 0.01)
        receipt = publisher.publish(2)
        assert receipt.why.startswith("delta: ")
        assert receipt.nbytes < whole.nbytes / 8
        assert serves(engine, receipt, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_a_peft_model_and_its_folder(engine_of: Any, serves: Any, tmp_path: Path) -> None:
    import peft

    engine = engine_of()
    torch.manual_seed(0)
    policy = peft.get_peft_model(tiny(width=WIDTH), peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["1", "0"]))
    policy.save_pretrained(tmp_path / "first")
    with ww.Publisher(tmp_path / "first", engine) as first:
        assert first.publish(6).why == ""
    with ww.Publisher(policy, engine, baseline="host") as publisher:
        publisher.start_from(tmp_path / "first", version=6)
        for version in (7, 8):
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    if "lora_" in name:
                        parameter.view(-1)[version::50] += 1
            assert publisher.publish(version, kind="delta").why.startswith("delta: ")
            policy.save_pretrained(tmp_path / "then")
            source = AdapterSource(*_read(tmp_path / "then"))
            assert serves(engine, None, dict(source.named()), source.lora)


def _read(folder: Path) -> tuple[Tensors, str]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors"), (folder / "adapter_config.json").read_text()


def test_over_http_only_the_delta_travels(engine_of: Any, serves: Any) -> None:
    engine, tensors = engine_of(), adapter_of()
    with serve(engine, token="secret") as server, ww.connect(server.url, token="secret") as far:
        sent: list[int] = []
        far[0]._client.event_hooks = {"request": [lambda request: sent.append(len(request.read()))]}
        with publisher_of(tensors, far, transport="http") as publisher:
            publisher.publish(1)
            whole = sum(sent)
            sent.clear()
            moved(tensors, 2, 0.001)
            receipt = publisher.publish(2)
            assert receipt.why.startswith("delta: ")
            assert sum(sent) < whole / 8
    assert serves(engine, None, tensors)


def test_kinds_by_name_and_too_much_changed(engine_of: Any, serves: Any) -> None:
    engine, tensors = engine_of(), adapter_of()
    with publisher_of(tensors, engine) as publisher:
        with pytest.raises(ww.UsageError, match="nothing was published before that a delta could start from"):
            publisher.publish(1, kind="delta")
        publisher.publish(1)
        moved(tensors, 2)
        receipt = publisher.publish(2, kind="dense")
        assert (receipt.kind, receipt.nbytes, receipt.why) == ("adapter", 4 * 4 * RANK * WIDTH, "")
        moved(tensors, 3)
        assert publisher.publish(3).why.startswith("delta: ")
        for tensor in tensors.values():
            tensor.normal_()
        receipt = publisher.publish(4)
        assert receipt.why.startswith("whole: about 100% of the elements changed, more than the 20%")
        for tensor in tensors.values():
            tensor.normal_()
        assert publisher.publish(5, kind="delta").why.startswith("delta: 100.00%")
        assert serves(engine, None, tensors)


def test_without_a_baseline_it_is_sent_whole(engine_of: Any) -> None:
    with publisher_of(adapter_of(), engine_of(), baseline=None) as publisher:
        assert [publisher.publish(version).why for version in (1, 2)] == ["", ""]
        with pytest.raises(ww.UsageError, match="baseline='host'"):
            publisher.publish(3, kind="delta")
    with pytest.raises(ww.UsageError, match=r"baseline='device', and this is a LoRA adapter. Take baseline='host'"):
        publisher_of(adapter_of(), engine_of(), baseline="device")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_unless_asked_for(engine_of: Any, bad: float) -> None:
    engine, tensors = engine_of(), adapter_of()
    with publisher_of(tensors, engine) as publisher:
        publisher.publish(1)
        before = outputs(engine)
        tensors["base_model.model.1.lora_A.weight"][2, 2] = bad
        with pytest.raises(ww.NonFinite, match=r"1\.lora_A"):
            publisher.publish(2)
        assert torch.equal(outputs(engine), before)
        assert publisher.publish(2, finite=False).why.startswith("delta: ")


# -- another base --------------------------------------------------------------------------------------------------


def test_another_dtype_or_shape_is_sent_whole_and_another_config_with_a_delta(
    engine_of: Any, serves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tensors = engine_of(), adapter_of()
    source = AdapterSource(tensors, CONFIG)
    with ww.Publisher(source, engine, baseline="host") as publisher:
        publisher.publish(1)
        source.lora = {**CONFIG, "lora_alpha": 32}
        moved(tensors, 3)
        receipt = publisher.publish(3)
        assert receipt.why.startswith("delta: ")
        assert serves(engine, receipt, tensors, source.lora)
        tensors = source._named = adapter_of(rank=4)
        source.lora = {**CONFIG, "r": 4}
        receipt = publisher.publish(4)
        assert receipt.why == "whole: the tensors are not those of the version before"
        assert serves(engine, receipt, tensors, source.lora)
        tensors = source._named = {name: tensor for name, tensor in tensors.items() if ".1." in name}
        assert publisher.publish(5).why == "whole: the tensors are not those of the version before"
        monkeypatch.setattr(ModuleTarget, "adapter_dtype", "bfloat16")
        publisher.close()  # after which engines are asked anew
        receipt = publisher.publish(6)
        assert receipt.why == "whole: the tensors are not those of the version before"
        assert receipt.nbytes == sum(tensor.numel() * 2 for tensor in tensors.values())


def test_what_an_engine_has_cast_itself_is_no_base(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModuleTarget, "adapter_dtype", "float32")
    tensors = adapter_of(dtype=torch.bfloat16)
    with publisher_of(tensors, engine_of()) as publisher:
        publisher.publish(1)
        why = "here holds adapters in float32, and this is sent as bfloat16"
        assert publisher.publish(2).why == f"whole: {why}"
        with pytest.raises(ww.UsageError, match=why):
            publisher.publish(3, kind="delta")


def test_an_engine_without_the_base_refuses_by_name_and_gets_everything(engine_of: Any, serves: Any) -> None:
    pair, tensors = [engine_of("a"), engine_of("b")], adapter_of()
    with publisher_of(tensors, pair) as publisher:
        publisher.publish(4)
        pair[1].unload("policy", timeout=SECONDS)
        with ww.Publisher(AdapterSource(adapter_of(2), CONFIG), pair[1]) as other:
            other.publish(5)
        moved(tensors, 6)
        before = [outputs(engine) for engine in pair]
        said = "version 4 of adapter 'policy', from which the delta starts, is not held here: 5. Publish the whole"
        with pytest.raises(ww.VersionError, match=f"b: begin: {said}"):
            publisher.publish(6, kind="delta")
        assert all(torch.equal(outputs(engine), old) for engine, old in zip(pair, before, strict=True))
        receipt = publisher.publish(6)
        assert receipt.why.startswith(f"whole: the delta was refused: b: begin: {said}")
        assert all(serves(engine, receipt, tensors) for engine in pair)
        moved(tensors, 7)
        receipt = publisher.publish(7)
        assert receipt.why.startswith("delta: ")
        assert all(serves(engine, receipt, tensors) for engine in pair)


def test_a_base_that_is_no_longer_the_newest_will_do(engine_of: Any, serves: Any) -> None:
    engine, tensors = engine_of(), adapter_of()
    with publisher_of(tensors, engine) as publisher, publisher_of(adapter_of(2), engine) as other:
        publisher.publish(4)
        other.publish(5)
        moved(tensors, 6)
        receipt = publisher.publish(6, kind="delta")
        assert serves(engine, receipt, tensors)


def test_a_base_of_the_right_version_and_other_elements_is_refused_by_name(engine_of: Any, serves: Any) -> None:
    engine, tensors = engine_of(), adapter_of()
    with publisher_of(adapter_of(2), engine) as other:
        other.publish(4)
    before = outputs(engine)
    with publisher_of(tensors, engine) as publisher:
        publisher.start_from(AdapterSource(tensors, CONFIG), version=4)
        moved(tensors, 5)
        with pytest.raises(ww.VersionError, match=r"seal: '.*lora_.\.weight': the delta starts from elements of dig"):
            publisher.publish(5, kind="delta")
        assert torch.equal(outputs(engine), before)
        assert versions(engine) == [4]
        assert publisher.publish(5).why.startswith("whole: the delta was refused: here: seal: '")
        assert serves(engine, None, tensors)


def test_a_base_is_cast_as_what_follows_it(engine_of: Any, serves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModuleTarget, "adapter_dtype", "bfloat16")
    engine, tensors = engine_of(), adapter_of()
    with publisher_of(tensors, engine, baseline=None) as publisher:
        publisher.publish(6)
    with publisher_of(tensors, engine) as publisher:
        publisher.start_from(AdapterSource({name: t.clone() for name, t in tensors.items()}, CONFIG), version=6)
        moved(tensors, 7)
        receipt = publisher.publish(7, kind="delta")
        assert serves(engine, receipt, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_a_restarted_trainer_says_what_it_starts_from(engine_of: Any, serves: Any) -> None:
    engine, tensors = engine_of(), adapter_of()
    with publisher_of(tensors, engine, baseline=None) as publisher:
        publisher.publish(6)
    last = {name: tensors[name].clone() for name in sorted(tensors, reverse=True)}  # in another order than it is sent
    with publisher_of(tensors, engine) as publisher:
        publisher.start_from(AdapterSource(last, {**CONFIG, "inference_mode": True}), version=6)
        moved(tensors, 7)
        assert serves(engine, publisher.publish(7, kind="delta"), tensors)
        with pytest.raises(ww.UsageError, match="one is a LoRA adapter and the other a whole model"):
            publisher.start_from(tiny(width=WIDTH), version=7)


# -- engines that missed some --------------------------------------------------------------------------------------


def test_an_engine_that_missed_a_version_gets_both_as_one_delta(
    engine_of: Any, serves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, tensors = [engine_of("a"), engine_of("b")], adapter_of()
    behind = pair[1].receiver
    with publisher_of(tensors, pair) as publisher:
        publisher.publish(4)
        moved(tensors, 5)
        with monkeypatch.context() as patched:
            patched.setattr(behind._revisions, "commit", fails)
            patched.setattr(pair[0], "abort", fails)
            with pytest.raises(ww.PublishError, match="1 of 2 engines did not commit"):
                publisher.publish(5)
        assert [versions(engine) for engine in pair] == [[4, 5], [4]]
        moved(tensors, 6)
        receipt = publisher.publish(6, kind="delta")
        assert receipt.why.endswith("MB; b: delta from 4 through 2 deltas")
        assert all(serves(engine, receipt, tensors) for engine in pair)
        assert receipt.engines["a"].nbytes < receipt.engines["b"].nbytes == receipt.nbytes


def fails(*_: Any, **__: Any) -> None:
    raise EngineError("it broke")


def test_a_commit_that_failed_on_one_engine_is_taken_back_and_the_next_delta_fits(
    engine_of: Any, serves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, tensors = [engine_of("a"), engine_of("b")], adapter_of()
    with publisher_of(tensors, pair) as publisher:
        publisher.publish(7)
        before = [outputs(engine) for engine in pair]
        moved(tensors, 8)
        with monkeypatch.context() as patched:
            patched.setattr(pair[1].receiver._revisions, "commit", fails)
            with pytest.raises(EngineError, match="it broke"):
                publisher.publish(8)
        assert [versions(engine) for engine in pair] == [[7], [7]]
        assert all(torch.equal(outputs(engine), old) for engine, old in zip(pair, before, strict=True))
        receipt = publisher.publish(9, kind="delta")
        assert all(serves(engine, receipt, tensors) for engine in pair)


# -- ranks of one engine -------------------------------------------------------------------------------------------


class Host:
    """An engine of several ranks, each a module of its own; they are handed the bytes in `sent`, by tensor."""

    name = model = "fake"
    idle = alone = in_order = False

    def __init__(self, ranks: int) -> None:
        torch.manual_seed(0)
        made = [tiny(width=WIDTH) for _ in range(ranks)]
        self.adapters = [ModuleAdapters(module, threading.RLock()) for module in made]
        # Of one rank alone all is done as it is asked for, so that it is sealed by the time it could be committed.
        self.receivers = [
            Receiver(ModuleTarget(each), self.fetch, rank=rank, background=ranks > 1)
            for rank, each in enumerate(self.adapters)
        ]
        self.sent: list[torch.Tensor] = []
        self.listed: list[Revision] = []
        self.asked: list[str] = []

    def fetch(self, address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
        for bucket in arrivals.buckets:
            data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            for piece in bucket.pieces:
                piece.within(data).copy_(piece.of(self.sent[piece.tensor].reshape(-1)))
            yield bucket.index, data

    async def call(self, op: str, arguments: bytes, body: bytes | None, timeout: float) -> list[bytes]:
        self.asked.append(op)
        return [await asyncio.to_thread(receiver.handle, op, arguments, body) for receiver in self.receivers]

    async def before_pause(self) -> None:
        pass

    async def in_use(self) -> dict[str, Any]:
        return {}

    async def list(self, revisions: Any) -> None:
        self.listed = list(revisions)

    def holds(self, version: int, tensors: Tensors) -> bool:
        """Whether every rank serves this version, and has just these tensors of it."""
        newest = self.listed[-1]
        found = [adapters._sent(newest, {}) for adapters in self.adapters]
        alike = all(torch.equal(each[name], tensor) for each in found for name, tensor in tensors.items())
        return newest.version == version and alike


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(request.param)
    asyncio.run(put(made, manifest_of(7, adapter_of()), list(adapter_of().values())))
    yield made
    for receiver in made.receivers:
        receiver.close()


def manifest_of(version: int, tensors: Tensors, deltas: list[Delta] | None = None, **changes: Any) -> Manifest:
    started = {"base_version": 7, "encoded": tuple(delta.nbytes for delta in deltas)} if deltas is not None else {}
    plain = {
        "version": version, "kind": "adapter", "adapter": Adapter(name="policy", config=CONFIG),
        "tensors": tuple(spec_of(name, tensor) for name, tensor in tensors.items()),
    }  # fmt: skip
    return Manifest(**{**plain, **started, "bucket_bytes": 4096, **changes})


async def put(host: Host, manifest: Manifest, sent: list[torch.Tensor]) -> Any:
    """As the only engine of a publish gets it: sealed and committed by one call, where it is one rank."""
    host.sent = sent
    control = Control(host)  # type: ignore[arg-type]
    id = (await control.begin(manifest, "trainer", SECONDS, SECONDS, "test:")).id
    try:
        digests = [scan(each).digest.hex() for each in sent]
        return await control.commit(id, "keep", False, SECONDS, digests)
    finally:
        if host.listed[-1:] != [] and host.listed[-1].version != manifest.version:
            await control.abort(id, SECONDS)


def step(seed: int = 8) -> tuple[Tensors, list[Delta]]:
    """What follows version 7, and the deltas that lead there."""
    old, new = adapter_of(), adapter_of()
    moved(new, seed)
    return new, [encode(name, old[name], new[name]) for name in new]


def put_step(host: Host, version: int = 8, **changes: Any) -> Any:
    new, deltas = step()
    return asyncio.run(put(host, manifest_of(version, new, deltas, **changes), [delta.data for delta in deltas]))


def test_every_rank_takes_it(host: Host) -> None:
    new, deltas = step()
    host.asked.clear()
    receipt = put_step(host)
    assert (host.asked.count("commit") == 0) == (len(host.receivers) == 1)  # a rank alone is asked by one call
    assert host.holds(8, new)
    assert (receipt.adapter, receipt.kind, receipt.ranks) == ("policy@8", "adapter", len(host.receivers))
    assert receipt.nbytes == sum(delta.nbytes for delta in deltas)
    assert receipt.digests == {name: scan(tensor).digest.hex() for name, tensor in new.items()}


def test_one_rank_that_fails_in_the_commit_takes_it_back_everywhere(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(host.receivers[-1]._revisions, "commit", fails)
        with pytest.raises(EngineError, match="it broke"):
            put_step(host)
    assert host.holds(7, adapter_of())
    assert {receiver.status()["state"] for receiver in host.receivers} == {"idle"}
    assert all(receiver.status()["adapters"][0]["versions"] == [7] for receiver in host.receivers)
    put_step(host, 9)
    assert host.holds(9, step()[0])


def test_one_rank_that_fails_as_it_keeps_what_it_decoded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    def breaks(staged: StagedAdapter) -> None:
        kept.append(staged)
        if len(kept) == len(host.receivers):
            raise RuntimeError("it broke")

    with monkeypatch.context() as patched:
        patched.setattr(StagedAdapter, "commit", breaks)
        with pytest.raises(EngineError, match=r"policy@8 could not be kept on rank \d: .*it broke"):
            put_step(host)
    assert host.holds(7, adapter_of())
    put_step(host, 9)
    assert host.holds(9, step()[0])


def test_harm_that_every_digest_on_the_way_agrees_to_is_refused_and_the_old_one_serves(host: Host) -> None:
    new, deltas = step()
    manifest = manifest_of(8, new, deltas)
    for place in range(0, deltas[2].nbytes, 97):
        sent = [delta.data.clone() for delta in deltas]
        sent[2][place] ^= 0x10
        with pytest.raises(ww.VerificationError, match=r"'base_model.model.1.lora_A.weight': not a whole delta"):
            asyncio.run(put(host, manifest, sent))
        assert host.holds(7, adapter_of())
    put_step(host)
    assert host.holds(8, new)


def test_harm_on_the_way_is_refused(host: Host) -> None:
    fetch = host.fetch

    def flips(address: str, arrivals: Arrivals) -> Iterator[tuple[int, torch.Tensor]]:
        for index, data in fetch(address, arrivals):
            data[100] ^= 1
            yield index, data

    for receiver in host.receivers:
        receiver._fetch = flips
    with pytest.raises(ww.VerificationError, match="arrived with another digest"):
        put_step(host)
    assert host.holds(7, adapter_of())


def test_a_base_of_another_name_or_version_is_not_taken(host: Host) -> None:
    with pytest.raises(ww.VersionError, match="version 6 of adapter 'policy', from which the delta starts, is"):
        put_step(host, base_version=6)
    with pytest.raises(ww.VersionError, match=r"version 7 of adapter 'other', .*is not held here: none"):
        put_step(host, adapter=Adapter(name="other", config=CONFIG))
    assert host.holds(7, adapter_of())


def test_tensors_that_the_base_has_otherwise_are_refused_by_name(host: Host) -> None:
    old, new = adapter_of(rank=4), adapter_of(3, rank=4)
    deltas = [encode(name, old[name], new[name]) for name in new]
    manifest = manifest_of(8, new, deltas, adapter=Adapter(name="policy", config={**CONFIG, "r": 4}))
    with pytest.raises(ww.VersionError, match=r"0\.lora_A\.weight is float32 \(8, 256\) in policy@7, float32 \(4"):
        asyncio.run(put(host, manifest, [delta.data for delta in deltas]))
    new, deltas = step()
    fewer = {name: tensor for name, tensor in new.items() if ".0." in name}
    with pytest.raises(ww.VersionError, match=r"policy@7 has base_model\.model\.1\.lora_A\.weight, of which nothing"):
        asyncio.run(put(host, manifest_of(8, fewer, deltas[:2]), [delta.data for delta in deltas[:2]]))
    assert host.holds(7, adapter_of())


def test_a_tensor_that_the_base_lacks_is_refused_by_name() -> None:
    host = Host(1)
    whole, (new, deltas) = adapter_of(), step()
    first = {name: tensor for name, tensor in whole.items() if ".0." in name}
    try:
        asyncio.run(put(host, manifest_of(7, first), list(first.values())))
        with pytest.raises(ww.VersionError, match=r"1\.lora_A\.weight is not there in policy@7, float32 \(8, 256\)"):
            asyncio.run(put(host, manifest_of(8, new, deltas), [delta.data for delta in deltas]))
    finally:
        host.receivers[0].close()


def test_a_base_that_goes_while_the_delta_arrives_is_refused(host: Host) -> None:
    for adapters in host.adapters:
        adapters.drop(host.listed[-1])
    with pytest.raises(ww.VersionError, match="policy@7 is held no more"):
        put_step(host)


def test_a_base_that_cannot_be_read_is_refused_by_name(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModuleAdapters, "_sent", fails)
    with pytest.raises(ww.VersionError, match=r"policy@7 cannot be read: it broke.*Publish the whole adapter"):
        put_step(host)


def test_there_must_be_room_for_the_whole_and_for_what_changes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    new, deltas = step()
    target, revision = ModuleTarget(host.adapters[0]), Revision("policy", 8, 8)
    needed = target.prepare_adapter(manifest_of(8, new), revision).nbytes + 12 * sum(each.nbytes for each in deltas)
    monkeypatch.setattr(ModuleTarget, "room", lambda target: needed - 1)
    with pytest.raises(ww.RoomError, match=f"the staged copy needs {needed} bytes on rank 0"):
        put_step(host)
    assert host.holds(7, adapter_of())


def test_scaling_goes_by_the_new_config(engine_of: Any, serves: Any) -> None:
    engine, old = engine_of(), adapter_of()
    ww.Engines([engine]).adapters.load("policy", old, CONFIG, version=7)
    new, deltas = step()
    config = {**CONFIG, "lora_alpha": 32}
    manifest = manifest_of(8, new, deltas, adapter=Adapter(name="policy", config=config), bucket_bytes=1 << 20)
    id = engine.begin(manifest, holder="me", lease=SECONDS, timeout=SECONDS).id
    for bucket in cut(manifest):
        data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for piece in bucket.pieces:
            piece.within(data).copy_(piece.of(deltas[piece.tensor].data))
        engine.put(id, bucket.index, memoryview(data.numpy()), timeout=SECONDS)
    digests = [scan(delta.data).digest.hex() for delta in deltas]
    engine.commit(id, digests=digests, pause="keep", keep_cache=False, timeout=SECONDS)
    assert serves(engine, None, new, config)


# -- manifests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"base_version": None}, "with sizes of deltas and no base version"),
        ({"encoded": ()}, "0 sizes of deltas for 4 tensors"),
        ({"encoded": (200,) * 5}, "5 sizes of deltas for 4 tensors"),
        ({"encoded": (1 << 40,) * 4}, "a delta of 1099511627776 bytes for 8192"),
        ({"staging": "none"}, "is for whole models"),
        ({"partial": True}, "of an adapter all tensors are sent"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(changes: dict[str, Any], match: str) -> None:
    new, deltas = step()
    with pytest.raises(ManifestError, match=match):
        manifest_of(8, new, deltas, **changes).check()


def test_a_manifest_of_an_adapters_delta_travels_as_json() -> None:
    new, deltas = step()
    manifest = manifest_of(8, new, deltas)
    assert decode_manifest(msgspec.json.encode(manifest)) == manifest
    assert manifest.nbytes == sum(delta.nbytes for delta in deltas)
    assert {spec.dtype for spec in manifest.wire} == {"uint8"}


# -- from the command line -----------------------------------------------------------------------------------------


def test_push_sends_what_changed_since_a_folder(
    engine_of: Any, serves: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from weightwire.cli.main import main

    engine, tensors = engine_of(), adapter_of()

    def saved(name: str) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_bytes(msgspec.json.encode(CONFIG))
        return str(tmp_path / name)

    old = saved("adapter-600")
    moved(tensors, 7)
    new = saved("adapter-700")
    with serve(engine, token="secret") as server:
        to = ["--as", "policy", "--to", server.url, "--token", "secret"]
        assert main(["push", old, *to]) == 0
        assert main(["push", new, "--base", old, *to]) == 0
        assert "delta: " in capsys.readouterr().out
        assert serves(engine, None, tensors)
        assert main(["push", new, "--base", old, *to, "--json"]) == 0  # another than it holds
        told = msgspec.json.decode(capsys.readouterr().out)
        assert told["why"].startswith("whole: the delta was refused")
    assert versions(engine) == [1, 2, 3]

"""Updates under load: no request fails, and each output names the weights it came from, rightly."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from reference import apart, logprobs

import weightwire as ww
from conftest import Server

pytestmark = pytest.mark.alone
REQUESTS, UPDATES = 200, 20


def test_200_streams_while_20_updates_arrive(server: Server, served_model: Any) -> None:
    base = server.version() or 0
    versions = {base + step: _moved(served_model, step) for step in range(1, UPDATES + 1)}
    outputs: list[dict[str, Any]] = []
    published = threading.Event()

    def stream(number: int) -> None:
        # Those that are late in line wait for nothing: the engine is kept busy until the last update is in.
        while True:
            outputs.append(_stream(server, [5 + number % 90, 20, 30 + number % 60], tokens=40))
            if published.is_set() or len(outputs) < REQUESTS:
                return

    with server.engines() as engines, ww.Publisher(served_model, engines) as warm, ThreadPoolExecutor(24) as pool:
        warm.publish(base + 1)
        jobs = [pool.submit(stream, number) for number in range(REQUESTS)]
        for version in range(base + 2, base + UPDATES + 2):
            with ww.Publisher(versions[version - 1], engines) as publisher:
                publisher.publish(version, deadline=300)
        published.set()
        for job in jobs:
            job.result(timeout=300)
    models = {version + 1: model for version, model in versions.items()}
    models[base + 1] = served_model
    assert len(outputs) >= REQUESTS
    _check(outputs, models)


def _check(outputs: list[dict[str, Any]], models: dict[int, Any]) -> None:
    seen: set[int] = set()
    told_apart = 0
    for output in outputs:
        assert output["finish_reason"] == "length"
        spans = output["versions"]
        assert spans, "an output without a version"
        assert [span[1] for span in spans] == [0, *(span[2] for span in spans[:-1])]
        assert spans[-1][2] == len(output["tokens"])
        for version, start, end in spans:
            seen.add(int(version))
            said = output["logprobs"][start:end]
            right = logprobs(models[int(version)], output["prompt"], output["tokens"])[start:end]
            assert apart(said, right) < 1e-3, (version, start, end)
            for neighbour in {int(version) - 1, int(version) + 1} & models.keys():
                wrong = logprobs(models[neighbour], output["prompt"], output["tokens"])[start:end]
                if end - start >= 5:
                    assert apart(said, wrong) > 1e-3, (version, neighbour, start, end)
                    told_apart += 1
    assert len(seen) > UPDATES // 2, f"the load saw only versions {sorted(seen)}"
    assert told_apart > REQUESTS / 2


@pytest.mark.parametrize("pause", ["keep", "wait", "abort"])
def test_requests_in_flight_go_on_are_waited_for_or_are_aborted(server: Server, trained: Any, pause: str) -> None:
    base = server.version() or 0
    started, published = threading.Event(), threading.Event()

    def stream(number: int) -> list[dict[str, Any]]:
        # One after the other until the update is in, so that whenever it comes some are in flight. Of different
        # lengths: batched together, streams of one length all end in the same step and leave a gap.
        outputs = []
        while not published.is_set():
            outputs.append(_stream(server, [7 + number, 8, 9], tokens=120 + 37 * number, started=started))
        return outputs

    with server.engines() as engines, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(stream, number) for number in range(4)]
        try:
            assert started.wait(120)
            with ww.Publisher(trained, engines) as publisher:
                receipt = publisher.publish(base + 1, pause=pause, deadline=120)
        finally:
            published.set()
        outputs = [output for job in jobs for output in job.result(timeout=180)]
    assert receipt.pause > 0
    spans = [[version for version, _, _ in output["versions"]] for output in outputs]
    both = [str(base), str(base + 1)] if base else ["default", str(base + 1)]
    reasons = {output["finish_reason"] for output in outputs}
    if pause == "keep":
        assert both in spans
        assert reasons == {"length"}
    else:
        assert both not in spans
        assert reasons == ({"length"} if pause == "wait" else {"length", "abort"})


def test_a_long_prompt_cached_under_the_old_weights_is_not_used_under_the_new(
    server: Server, served_model: Any, trained: Any
) -> None:
    base = server.version() or 0
    prompt = [5 + i % 90 for i in range(160)]
    with server.engines() as engines:
        server.generate(prompt)
        with ww.Publisher(trained, engines) as publisher:
            publisher.publish(base + 1)
        output = server.generate(prompt)
        assert apart(output["logprobs"], logprobs(trained, prompt, output["tokens"])) < 1e-3
        # On request the cache is kept, and then it is the old one: that is what was asked for.
        with ww.Publisher(served_model, engines) as publisher:
            publisher.publish(base + 2, keep_cache=True)
        output = server.generate(prompt)
        assert apart(output["logprobs"], logprobs(served_model, prompt, output["tokens"])) > 1e-3


def test_requests_in_flight_keep_what_they_have_and_no_other_gets_it(
    server: Server, served_model: Any, trained: Any
) -> None:
    version = server.version() or 0
    prompt = [5 + i % 90 for i in range(64)]
    with server.engines() as engines, ThreadPoolExecutor(1) as pool:
        for model in (served_model, trained) * 5:
            # Until an update finds it in the middle.
            started, version = threading.Event(), version + 1
            running = pool.submit(_stream, server, prompt, tokens=160, started=started)
            assert started.wait(120)
            with ww.Publisher(model, engines) as publisher:
                publisher.publish(version, keep_cache="running", deadline=120)
            first = server.generate(prompt)
            output = running.result(timeout=180)
            if len(output["versions"]) == 2 and model is trained:
                break
        # It went on with keys and values of the old weights: computed again they would be those of the new.
        (_, start, end) = output["versions"][1]
        assert apart(output["logprobs"][start:end], logprobs(trained, prompt, output["tokens"])[start:end]) > 1e-3
        # Who came later shares its prompt, and then its tokens too, but none of these.
        assert apart(first["logprobs"], logprobs(trained, prompt, first["tokens"])) < 1e-3
        longer = prompt + output["tokens"]
        after = server.generate(longer)
        assert apart(after["logprobs"], logprobs(trained, longer, after["tokens"])) < 1e-3


def _moved(model: Any, step: int) -> Any:
    torch.manual_seed(step)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return moved


def _stream(
    server: Server, prompt: list[int], *, tokens: int, started: threading.Event | None = None
) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "max_tokens": tokens, "logprobs": 0, "ignore_eos": True, "seed": sum(prompt)}
    body = {"token_ids": prompt, "sampling_params": sampling, "stream": True}
    output: dict[str, Any] = {"prompt": prompt, "tokens": [], "logprobs": [], "versions": [], "finish_reason": None}
    with server.client.stream("POST", "/inference/v1/generate", json=body) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line[6:])["choices"]:
                if started is not None:
                    started.set()
                output["tokens"] += choice["token_ids"] or []
                if choice.get("logprobs"):
                    output["logprobs"] += [step["logprob"] for step in choice["logprobs"]["content"]]
                output["finish_reason"] = choice["finish_reason"] or output["finish_reason"]
                if choice.get("weight_versions"):
                    output["versions"] = [(s["version"], s["start"], s["end"]) for s in choice["weight_versions"]]
    return output

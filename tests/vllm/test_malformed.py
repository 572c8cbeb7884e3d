"""Malformed manifests by the hundred against a real server; `tests/engines/test_routes.py` has them by the thousand."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Server
from weightwire.sources.tensors import TensorSource

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
junk = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner), max_leaves=6
)
fields = st.sampled_from(["version", "tensors", "kind", "aliases", "partial", "finite", "bucket_bytes", "what"])
tensor = st.fixed_dictionaries(
    {"name": st.text(max_size=12), "dtype": st.sampled_from(["float32", "bfloat16", "object"]) | junk, "shape": junk}
)


def test_no_malformed_manifest_is_taken_or_breaks_the_server(server: Server, served_model: Any) -> None:
    before, prompt = server.version(), [10, 20, 30]
    said = server.generate(prompt)
    specs = TensorSource(dict(served_model.state_dict())).metadata()
    valid = {
        "version": (before or 0) + 1,
        "tensors": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs],
    }

    def is_refused(body: Any) -> None:
        reply = server.client.post(
            "/v1/weightwire/updates",
            content=json.dumps(body).encode(),
            headers={"x-weightwire-token": server.token or "", "content-type": "application/json"},
        )
        if reply.status_code == 201:  # what was changed did not matter; let go of it
            server.client.delete(
                f"/v1/weightwire/updates/{reply.json()['id']}", headers={"x-weightwire-token": server.token or ""}
            )
        else:
            assert 400 <= reply.status_code < 500, reply.text
            assert reply.json()["error"]["message"]

    @settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)
    @given(
        junk
        | st.fixed_dictionaries({"manifest": junk})
        | st.fixed_dictionaries({"manifest": st.just(valid), "lease": junk})
    )
    def any_json(body: Any) -> None:
        is_refused(body)

    @settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)
    @given(fields, junk | st.lists(tensor, max_size=3))
    def one_field_changed(field: str, value: Any) -> None:
        is_refused({"manifest": {**valid, field: value}})

    any_json()
    one_field_changed()
    assert server.version() == before
    assert server.generate(prompt) == said
    with server.engines() as engines:
        assert engines[0].status().state == "idle"

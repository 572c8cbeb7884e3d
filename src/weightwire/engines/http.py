"""An engine behind a URL: the `Engine` port as the HTTP calls of `engines.routes`. Needs the extra `client`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from weightwire.engines.base import Begun, EngineStatus, KeepCache, Pause
from weightwire.errors import AuthError, DeadlineError, EngineError, EngineLost, UsageError, WeightwireError
from weightwire.updates.manifest import Manifest
from weightwire.updates.receipt import EngineReceipt

__all__ = ["TOKEN_HEADER", "HttpEngine"]

TOKEN_HEADER = "x-weightwire-token"
_CONNECT_SECONDS = 10.0
_GRACE_SECONDS = 5.0
_MAX_SECONDS = 3600.0  # what the server takes at most


class HttpEngine:
    """A vLLM server with the plugin on, by its URL. The connection pool is its own; `close()` ends it."""

    over_http = True

    def __init__(self, url: str, *, token: str | None = None, api_key: str | None = None) -> None:
        try:
            import httpx2 as httpx
        except ImportError as error:
            raise UsageError(
                "connecting to a URL needs httpx2", next_step="pip install 'weightwire[client]'"
            ) from error
        self._httpx = httpx
        socket_path = url.removeprefix("unix:") if url.startswith("unix:") else None
        host = _host("http://localhost" if socket_path else url)
        if host is None or socket_path == "":
            raise UsageError(f"not a URL of an engine: {url!r}", next_step="Pass http://HOST:PORT or unix:/PATH.")
        self.name = url.rstrip("/")
        self.host = "" if socket_path else host
        headers = {TOKEN_HEADER: token} if token else {}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        base = "http://localhost" if socket_path else self.name
        # One request a connection would cost a handshake each; but a pooled connection that the server has closed
        # meanwhile must not fail a call, so connecting is tried again. Nothing else is.
        transport = httpx.HTTPTransport(uds=socket_path, retries=1)
        try:
            self._client = httpx.Client(
                base_url=f"{base}/v1/weightwire", headers=headers, transport=transport, trust_env=False
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UsageError(f"not a URL of an engine, or not a token: {error}") from error

    def status(self, offers: Sequence[str] = (), *, timeout: float = 30.0) -> EngineStatus:
        status: EngineStatus = self._call("GET", "/status", timeout, query={"offer": list(offers)}, reply=EngineStatus)
        receipt = status.receipt and msgspec.structs.replace(status.receipt, engine=self.name)
        return msgspec.structs.replace(status, engine=self.name, receipt=receipt)

    def begin(
        self,
        manifest: Manifest,
        *,
        holder: str,
        lease: float,
        address: str | None = None,
        id: str | None = None,
        timeout: float,
    ) -> Begun:
        said = {"manifest": manifest, "holder": holder, "lease": lease, "address": address, "id": id}
        body = msgspec.json.encode(said)
        begun: Begun = self._call("POST", "/updates", timeout, body, phase="begin", reply=Begun)
        return begun

    def stage(self, id: str, address: str, *, timeout: float) -> None:
        self._call("POST", f"/updates/{id}/stage", timeout, msgspec.json.encode({"address": address}))

    def put(self, id: str, index: int, body: memoryview, *, timeout: float) -> None:
        self._call("PUT", f"/updates/{id}/buckets/{index}", timeout, bytes(body), phase="stage", binary=True)

    def seal(self, id: str, digests: Sequence[str], *, timeout: float) -> None:
        self._call("POST", f"/updates/{id}/seal", timeout, msgspec.json.encode({"digests": digests}))

    def commit(
        self, id: str, *, digests: Sequence[str] | None = None, pause: Pause, keep_cache: KeepCache, timeout: float
    ) -> EngineReceipt:
        body = msgspec.json.encode({"pause": pause, "keep_cache": keep_cache, "digests": digests})
        receipt: EngineReceipt = self._call("POST", f"/updates/{id}/commit", timeout, body, reply=EngineReceipt)
        return msgspec.structs.replace(receipt, engine=self.name)

    def abort(self, id: str, *, timeout: float) -> None:
        self._call("DELETE", f"/updates/{id}", timeout, phase="abort")

    def unload(self, name: str, *, timeout: float) -> None:
        self._call("DELETE", f"/adapters/{quote(name, safe='')}", timeout, phase="unload")

    def check_caller(self) -> None:
        pass

    def close(self) -> None:
        self._client.close()

    def _call(
        self,
        method: str,
        path: str,
        timeout: float,
        body: bytes | None = None,
        *,
        phase: str | None = None,
        binary: bool = False,
        query: Mapping[str, Any] | None = None,
        reply: Any = None,
    ) -> Any:
        httpx = self._httpx
        phase = phase or path.rpartition("/")[2]
        timeout = min(max(timeout, 0.001), _MAX_SECONDS)
        content = "application/octet-stream" if binary else "application/json"
        try:
            response = self._client.request(
                method,
                path,
                content=body,
                params={**(query or {}), "timeout": f"{timeout:.3f}"},
                headers={"content-type": content} if body is not None else None,
                # The server keeps the deadline; this one only fires when the server itself is gone.
                timeout=httpx.Timeout(timeout + _GRACE_SECONDS, connect=min(timeout, _CONNECT_SECONDS)),
            )
        except httpx.TimeoutException as error:
            raise DeadlineError(f"no answer within {timeout:.1f} s", engine=self.name, phase=phase) from error
        except httpx.TransportError as error:
            raise EngineLost(
                f"no connection: {error or type(error).__name__}",
                engine=self.name,
                phase=phase,
                next_step="Is the server running, and is this its address?",
            ) from error
        if not response.is_success:
            raise self._error(response.status_code, response.content).at(phase=phase)
        try:
            return None if reply is None else msgspec.json.decode(response.content, type=reply)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._other_server(f"an answer that is not weightwire's ({error})").at(phase=phase) from error

    def _error(self, status: int, content: bytes) -> WeightwireError:
        try:
            error = WeightwireError.from_wire(msgspec.json.decode(content)["error"]["weightwire"])
            error.engine = self.name
            return error
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            pass
        text = content[:300].decode(errors="replace")
        if status == 401:
            return AuthError(
                "the server wants an API key", engine=self.name, next_step="Pass connect(..., api_key=...)."
            )
        if status == 404:
            return self._other_server("no such path")
        return EngineError(f"HTTP {status}: {text}", engine=self.name)

    def _other_server(self, what: str) -> EngineError:
        return EngineError(
            f"this server does not speak weightwire: {what}",
            engine=self.name,
            next_step="Start it with `weightwire serve`, or add weightwire to VLLM_PLUGINS.",
        )


def _host(url: str) -> str | None:
    """The host of an HTTP URL, or None if it is none."""
    try:
        parts = urlsplit(url)
        return parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:
        return None

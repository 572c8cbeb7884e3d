"""The HTTP calls, as a FastAPI router over a `Control`. FastAPI comes with vLLM; nothing else imports this file.

A body is looked at only after the token was right and its announced size is allowed; nothing a client names is ever a
path, and nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from weightwire.engines.adapter_body import load_body
from weightwire.engines.base import Begun, EngineStatus, KeepCache, Pause
from weightwire.engines.control import Control
from weightwire.engines.http import TOKEN_HEADER
from weightwire.errors import (
    AdapterNotFound,
    AuthError,
    DeadlineError,
    EngineError,
    ManifestError,
    TooLarge,
    TransportError,
    UpdateNotFound,
    UsageError,
    WeightwireError,
)
from weightwire.updates.adapter import check_name
from weightwire.updates.manifest import Manifest, decode_manifest
from weightwire.updates.receipt import EngineReceipt

__all__ = ["MAX_ADAPTER_BODY", "MAX_BUCKET_BODY", "MAX_JSON_BODY", "TOKEN_HEADER", "error_response", "router"]

logger = logging.getLogger("vllm.weightwire.routes")

PREFIX = "/v1/weightwire"
MAX_JSON_BODY = 64 << 20
MAX_BUCKET_BODY = 128 << 20
MAX_ADAPTER_BODY = 2 << 30
_MAX_SECONDS = 3600.0
_WATCH_SECONDS = 1.0
T = TypeVar("T")
Handler = Callable[[Request, Control, bytes], Awaitable[Any]]

Address = Annotated[str, msgspec.Meta(max_length=MAX_JSON_BODY)]
Lease = Annotated[float, msgspec.Meta(gt=0, le=_MAX_SECONDS)]
# To the very end: `$` is also before a newline there.
Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]*(?![\s\S])", min_length=32, max_length=32)]


class BeginBody(msgspec.Struct, forbid_unknown_fields=True):
    manifest: msgspec.Raw
    holder: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] = "unnamed"
    lease: Lease = 60.0
    address: Address | None = None
    id: Hex | None = None


class StageBody(msgspec.Struct, forbid_unknown_fields=True):
    address: Address


class SealBody(msgspec.Struct, forbid_unknown_fields=True):
    digests: list[Hex]


class CommitBody(msgspec.Struct, forbid_unknown_fields=True):
    pause: Pause = "keep"
    keep_cache: KeepCache = False
    digests: list[Hex] | None = None


class _Safetensors:
    """In place of a body's type: raw bytes, of a whole adapter."""


def router(control: Callable[[Request], Control], token: Callable[[Request], str | None]) -> APIRouter:
    """The routes. `control` and `token` are looked up per request; a token of None means that none is needed, an
    empty one that nobody gets in."""
    routes = APIRouter(prefix=PREFIX)

    def route(
        method: str, path: str, *, body: Any = None, reply: Any = None, status: int = 200
    ) -> Callable[[Handler], None]:
        def register(handler: Handler) -> None:
            async def endpoint(request: Request) -> Response:
                try:
                    _check_token(request, token(request))
                    data = b"" if body is None else await _read(request, _limit(body))
                    result = await _while_connected(request, handler(request, control(request), data))
                except WeightwireError as error:
                    return error_response(error)
                except Exception as error:
                    logger.exception("weightwire: %s %s", method, path)
                    return error_response(EngineError(f"unexpected {error!r}"))
                content = b"" if reply is None else msgspec.json.encode(result)
                return Response(content, status_code=status, media_type="application/json" if content else None)

            endpoint.__name__ = handler.__name__
            endpoint.__doc__ = handler.__doc__
            routes.add_api_route(
                path, endpoint, methods=[method], status_code=status, openapi_extra=_describe(body, path)
            )

        return register

    @route("GET", "/status", reply=EngineStatus)
    async def status(request: Request, control: Control, _: bytes) -> EngineStatus:
        """Version, state, who holds the engine, and which offered transports can be used."""
        offers = request.query_params.getlist("offer")
        if len(offers) > 16 or any(len(offer) > 512 for offer in offers):
            raise UsageError("too many offers, or one that is too long")
        return await control.status(offers, _seconds(request))

    @route("POST", "/updates", body=(BeginBody, Manifest), reply=Begun, status=201)
    async def begin(request: Request, control: Control, data: bytes) -> Begun:
        """Check a manifest and take the engine for one update; with an address, begin to stage from it."""
        body = _parsed(data, BeginBody)
        manifest = decode_manifest(bytes(body.manifest))
        return await control.begin(manifest, body.holder, body.lease, _seconds(request), body.address, body.id)

    @route("POST", "/updates/{id}/stage", body=StageBody, status=204)
    async def stage(request: Request, control: Control, data: bytes) -> None:
        """Have every rank fetch every bucket from an address; answers when all have."""
        await control.stage(_id(request), _parsed(data, StageBody).address, _seconds(request))

    @route("PUT", "/updates/{id}/buckets/{n}", body=bytes, status=204)
    async def put(request: Request, control: Control, data: bytes) -> None:
        """One bucket's bytes."""
        id, n = _id(request), request.path_params["n"]
        if not (n.isascii() and n.isdigit() and len(n) < 10):
            raise UpdateNotFound(f"bucket {n[:32]!r}: not a number")
        await control.put(id, int(n), data, _seconds(request))

    @route("POST", "/updates/{id}/seal", body=SealBody, status=204)
    async def seal(request: Request, control: Control, data: bytes) -> None:
        """Verify on every rank, once what it is fetching has arrived."""
        await control.seal(_id(request), _parsed(data, SealBody).digests, _seconds(request))

    @route("POST", "/updates/{id}/commit", body=CommitBody, reply=EngineReceipt)
    async def commit(request: Request, control: Control, data: bytes) -> EngineReceipt:
        """Make it live; with digests, seal it first."""
        body = _parsed(data, CommitBody)
        return await control.commit(_id(request), body.pause, body.keep_cache, _seconds(request), body.digests)

    @route("DELETE", "/updates/{id}", status=204)
    async def abort(request: Request, control: Control, _: bytes) -> None:
        """Forget an update. One that is no more is forgotten already."""
        await control.abort(_id(request), _seconds(request))

    @route("PUT", "/adapters/{name}", body=_Safetensors, reply=EngineReceipt)
    async def load(request: Request, control: Control, data: bytes) -> EngineReceipt:
        """Load a LoRA adapter, or a new revision of one: a safetensors body with its config in the metadata."""
        version = request.query_params.get("version")
        if version is not None and not (version.isascii() and version.isdigit() and len(version) < 20):
            raise UsageError(f"version={version[:32]!r}", next_step="A version is a non-negative integer.")
        number = None if version is None else int(version)
        return await asyncio.shield(
            load_body(control, check_name(request.path_params["name"]), number, data, _seconds(request))
        )

    @route("GET", "/adapters/{name}", reply=dict[str, Any])
    async def adapter(request: Request, control: Control, _: bytes) -> dict[str, Any]:
        """An adapter's newest version, and those that can be pinned."""
        name = check_name(request.path_params["name"])
        for found in (await control.status((), _seconds(request))).adapters:
            if found["name"] == name:
                return found
        raise AdapterNotFound(f"no adapter {name!r} is loaded")

    @route("DELETE", "/adapters/{name}", status=204)
    async def unload(request: Request, control: Control, _: bytes) -> None:
        """Serve an adapter no more; requests in flight finish."""
        await control.unload(check_name(request.path_params["name"]), _seconds(request))

    return routes


def error_response(error: WeightwireError) -> Response:
    """An error in the OpenAI shape, with everything `from_wire` needs beside it."""
    body = {
        "error": {
            "message": str(error),
            "type": type(error).__name__,
            "param": None,
            "code": error.code,
            "weightwire": error.to_wire(),
        }
    }
    headers = {"www-authenticate": "WeightwireToken"} if error.status == 401 else None
    return Response(msgspec.json.encode(body), status_code=error.status, media_type="application/json", headers=headers)


def _check_token(request: Request, token: str | None) -> None:
    if token is None:
        return
    given = request.headers.get(TOKEN_HEADER, "")
    # Of digests, so that neither the length nor a common prefix shows in the time it takes.
    same = hmac.compare_digest(_sha(given), _sha(token))
    if not (same and token):
        raise AuthError(
            "this call needs the server's token, and was sent none or another"
            if token
            else "this server was started without a token",
            next_step=(
                f"Send it as {TOKEN_HEADER}: connect(..., token=...) or --token-file."
                if token
                else "Start it with `weightwire serve`, or set WEIGHTWIRE_TOKEN or WEIGHTWIRE_TOKEN_FILE."
            ),
        )


def _sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _seconds(request: Request) -> float:
    text = request.query_params.get("timeout", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _MAX_SECONDS:
        raise UsageError(f"timeout={text[:32]!r}", next_step=f"Take seconds, more than 0 and at most {_MAX_SECONDS}.")
    return seconds


def _id(request: Request) -> str:
    id = str(request.path_params["id"])
    if len(id) != 32 or any(c not in "0123456789abcdef" for c in id):
        raise UpdateNotFound(f"no update {id[:64]!r}")
    return id


def _parsed(data: bytes, type: type[T]) -> T:
    try:
        return msgspec.json.decode(data or b"{}", type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"the body is not what this call takes: {error}") from error


def _limit(body: Any) -> int:
    return {bytes: MAX_BUCKET_BODY, _Safetensors: MAX_ADAPTER_BODY}.get(body, MAX_JSON_BODY)


async def _read(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 20 or int(announced) > limit:
        raise TooLarge(f"a body of {announced[:32]} bytes, at most {limit} are taken")
    body = bytearray()
    seconds = _seconds(request)
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise TooLarge(f"a body of more than {limit} bytes")
    except TimeoutError as error:
        raise DeadlineError(f"{len(body)} bytes of the body arrived within {seconds:g} s") from error
    except ClientDisconnect as error:
        raise TransportError(f"the client hung up after {len(body)} bytes of the body") from error
    return bytes(body)


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. Not while a body is being read: to ask whether
    the client is still there takes the next message from the connection, whatever it is."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_WATCH_SECONDS))[0]:
            if await request.is_disconnected():
                task.cancel()
        return task.result()
    except asyncio.CancelledError:
        task.cancel()
        raise UpdateNotFound("the client hung up") from None


def _describe(body: Any, path: str) -> dict[str, Any]:
    """What FastAPI cannot see, since handlers take the bare request: parameters and bodies."""
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in path.split("/")
        if part.startswith("{")
    ]
    seconds = {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_SECONDS, "default": 60}
    parameters += [
        {"name": "timeout", "in": "query", "description": "seconds", "schema": seconds},
        {"name": TOKEN_HEADER, "in": "header", "schema": {"type": "string"}},
    ]
    described: dict[str, Any] = {"parameters": parameters}
    if body in (bytes, _Safetensors):
        schema: dict[str, Any] = {"type": "string", "format": "binary"}
        described["requestBody"] = {"content": {"application/octet-stream": {"schema": schema}}, "required": True}
    elif body is not None:
        described["requestBody"] = {"content": {"application/json": {"schema": _schema(body)}}, "required": True}
    return described


def _schema(body: Any) -> dict[str, Any]:
    if isinstance(body, tuple):
        outer, inner = (_schema(part) for part in body)
        outer["properties"]["manifest"] = inner
        return outer
    (schema,), parts = msgspec.json.schema_components([body], ref_template="{name}")
    return _inline(schema, parts)  # type: ignore[no-any-return]


def _inline(node: Any, parts: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return (
            _inline(parts[node["$ref"]], parts) if "$ref" in node else {k: _inline(v, parts) for k, v in node.items()}
        )
    return [_inline(item, parts) for item in node] if isinstance(node, list) else node

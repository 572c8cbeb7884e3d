"""How buckets travel: one file for each way, and the choice between them.

Choosing tries them all and keeps each refusal's reason, so that `explain()` and `weightwire doctor` can show them.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightwire.errors import TransportError, UsageError, WeightwireError
from weightwire.receiver import Arrivals, Arrived, Fetch, Lent
from weightwire.transports import cuda_ipc, gloo, http, nccl, shm
from weightwire.transports.base import BUCKET_BYTES, Lender, Link, Pushes, Sender, SendsParts, Transport, Wait, Weights

__all__ = [
    "BUCKET_BYTES",
    "NAMES",
    "Choice",
    "Lender",
    "Link",
    "Pushes",
    "Sender",
    "SendsParts",
    "Transport",
    "Wait",
    "Weights",
    "fetch",
    "make",
    "open_lent",
    "probe",
    "resolve",
    "sweep",
]

_MAKERS: dict[str, Callable[[Weights], Transport | Lender]] = {
    "cuda-ipc": cuda_ipc.CudaIpc,
    "nccl": nccl.Nccl,
    "shm": lambda weights: shm.Shm(),
    "gloo": lambda weights: gloo.Gloo(),
    "http": lambda weights: http.Http(),
}
_FETCH: dict[str, Fetch] = {"nccl": nccl.fetch, "shm": shm.fetch, "gloo": gloo.fetch}
_OPEN = {"cuda-ipc": cuda_ipc.open_lent}
_PROBE = {
    "cuda-ipc": cuda_ipc.probe,
    "nccl": nccl.probe,
    "shm": shm.probe,
    "gloo": gloo.probe,
    "http": http.probe,
}
_UNENCRYPTED = ("nccl", "gloo")

NAMES = tuple(_MAKERS)
"""Every transport, the preferred one first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport chosen for one engine, and why not each of the others (None: it could be used as well)."""

    name: str
    reasons: Mapping[str, str | None] = field(default_factory=dict)
    ranks: int = 1
    """How many ranks the engine has."""
    adapter_dtype: str | None = None
    """The dtype to which the engine casts LoRA adapters."""
    gpus: tuple[str | None, ...] = ()
    """The GPU of each rank (`engines.base.EngineStatus`); of an engine that does not say so, nothing."""
    one_server: bool = False
    """As `engines.base.EngineStatus`."""

    @property
    def usable(self) -> list[str]:
        """Every transport that works here, the preferred one first."""
        return [name for name, reason in self.reasons.items() if reason is None]


def make(weights: Weights) -> dict[str, Transport | Lender]:
    """One of each, for a publisher to own."""
    return {name: maker(weights) for name, maker in _MAKERS.items()}


def resolve(
    transports: Mapping[str, Transport | Lender],
    ask: Callable[[Sequence[str]], Mapping[str, str | None]],
    *,
    host: str,
    wanted: str | None = None,
    over_http: bool,
) -> Choice:
    """Try every transport with one engine and choose the first that works, or the one `wanted`.

    `host` is where the engine runs, `over_http` whether it is spoken to over HTTP, and `ask` has each of its ranks try
    the addresses offered. Raises `TransportError` with every reason when nothing is left.
    """
    reasons: dict[str, str | None] = {}
    offers: dict[str, str] = {}
    with contextlib.ExitStack() as offered:
        for name, transport in transports.items():
            if name == "http" and not over_http:
                reasons[name] = "the engine has no HTTP server"
            elif name == "cuda-ipc" and not is_local(host):
                reasons[name] = "the engine is on another host"
            elif name in _UNENCRYPTED and wanted != name and not is_local(host):
                reasons[name] = "it is not encrypted and the engine is on another host; ask for it by name to use it"
            else:
                try:
                    offers[name] = offered.enter_context(transport.offer(host))
                except TransportError as error:
                    reasons[name] = error.message
                except OSError as error:
                    reasons[name] = str(error)
        answers = ask(list(offers.values()))
    reasons |= {name: answers.get(offer) for name, offer in offers.items()}
    reasons = {name: reasons[name] for name in transports}
    usable = [name for name, reason in reasons.items() if reason is None]
    if wanted is None and usable:
        return Choice(usable[0], reasons)
    if wanted in usable:
        return Choice(str(wanted), reasons)
    table = "; ".join(f"{name}: {reason or 'usable'}" for name, reason in reasons.items())
    raise TransportError(
        f"transport {wanted!r} cannot be used ({table})" if wanted else f"no transport can be used ({table})",
        phase="resolve",
        next_step="`weightwire doctor` shows the same table.",
    )


def fetch(address: str, arrivals: Arrivals) -> Iterator[Arrived]:
    """The worker's half: every bucket from `address`, in order (`receiver.Fetch`)."""
    scheme = address.partition(":")[0]
    if scheme not in _FETCH:
        raise UsageError(f"no transport fetches from {address[:80]!r}; known are {', '.join(_FETCH)}")
    return _FETCH[scheme](address, arrivals)


def open_lent(address: str, arrivals: Arrivals) -> Lent | None:
    """The worker's half of a `Lender`: every tensor of the update, in the trainer's memory. None when `address` is of a
    way that brings buckets."""
    lender = _OPEN.get(address.partition(":")[0])
    return None if lender is None else lender(address, arrivals.tensors)


def probe(offer: str) -> str | None:
    """The worker's half of `resolve`: None when this rank can use what is offered, else why not."""
    scheme = offer.partition(":")[0]
    if scheme not in _PROBE:
        return f"this engine knows no transport {scheme[:32]!r}"
    try:
        return _PROBE[scheme](offer)
    except WeightwireError as error:
        return error.message


def sweep(update: str) -> None:
    """Remove what a trainer that died may have left of an update, and let go of what it lent."""
    shm.sweep(update)
    cuda_ipc.sweep()


def is_local(host: str) -> bool:
    """Whether an address means this machine.

    >>> is_local("127.0.0.1"), is_local("localhost"), is_local("10.0.0.3")
    (True, True, False)
    """
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

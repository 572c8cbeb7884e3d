"""Everything that can go wrong, as one tree.

    WeightwireError
     ├── UsageError              an argument that cannot work
     ├── AuthError               no token, or a wrong one
     ├── ManifestError           the update is malformed, or is not for this model
     │    ├── UnknownTensor        a name the engine does not have
     │    ├── MissingTensor        a parameter nobody sent
     │    └── ShapeMismatch        the right name with another dtype or shape
     ├── VersionError            a version that does not grow, or a base the engine does not have
     ├── BusyError               another trainer holds the engine
     ├── AdapterNotFound         no LoRA adapter of that name is loaded
     ├── UpdateNotFound          that update was aborted, ran out of its lease, or never was
     ├── StateError              the right call at the wrong time
     ├── RoomError               no memory for the staged copy
     ├── TooLarge                a body over the limit
     ├── TransportError          the bytes did not arrive
     ├── VerificationError       the bytes arrived and are not what was sent
     │    └── NonFinite            NaN or Inf among them
     ├── UnsupportedError        this engine or layout cannot be updated exactly
     ├── SourceError             the trainer's weights could not be read
     ├── EngineError             the engine itself failed
     │    ├── EngineLost           its process died, or nobody answers there
     │    ├── DeadlineError        it did not answer in time
     │    └── PoisonedError        a commit failed half-way; it refuses to generate until a full update heals it
     └── PublishError            several engines ended differently; `.outcomes` has each

Errors cross the wire as JSON and come back as the same class. Each has an HTTP `status`, a stable `code`, and
`engine` and `phase` where they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

__all__ = [
    "AdapterNotFound",
    "AuthError",
    "BusyError",
    "DeadlineError",
    "EngineError",
    "EngineLost",
    "ManifestError",
    "MissingTensor",
    "NonFinite",
    "PoisonedError",
    "PublishError",
    "RoomError",
    "ShapeMismatch",
    "SourceError",
    "StateError",
    "TooLarge",
    "TransportError",
    "UnknownTensor",
    "UnsupportedError",
    "UpdateNotFound",
    "UsageError",
    "VerificationError",
    "VersionError",
    "WeightwireError",
]


class WeightwireError(Exception):
    """Base of every error this package raises.

    >>> error = BusyError("version 7 is being staged", engine="http://a:8000", phase="begin", next_step="Wait.")
    >>> str(error)
    'http://a:8000: begin: version 7 is being staged. Wait.'
    >>> type(WeightwireError.from_wire(error.to_wire())).__name__
    'BusyError'
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "weightwire_error"

    def __init__(
        self,
        message: str,
        *,
        engine: str | None = None,
        phase: str | None = None,
        next_step: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message.rstrip(". ")
        self.engine = engine
        self.phase = phase
        self.next_step = next_step
        self.details = dict(details or {})

    def __str__(self) -> str:
        where = "".join(f"{part}: " for part in (self.engine, self.phase) if part)
        return f"{where}{self.message}" + (f". {self.next_step}" if self.next_step else "")

    def at(self, *, engine: str | None = None, phase: str | None = None) -> Self:
        """This error, told where it happened; what is already known is kept."""
        self.engine = self.engine or engine
        self.phase = self.phase or phase
        return self

    def to_wire(self) -> dict[str, Any]:
        """Plain data: what `from_wire` takes."""
        return {
            "code": self.code,
            "message": self.message,
            "engine": self.engine,
            "phase": self.phase,
            "next_step": self.next_step,
            "details": self.details,
        }

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> WeightwireError:
        """The error `to_wire` described, as its own class; an unknown code becomes an `EngineError`."""
        error = _BY_CODE.get(str(data.get("code")), EngineError)(
            str(data.get("message", "no message")),
            engine=data.get("engine"),
            phase=data.get("phase"),
            next_step=data.get("next_step"),
        )
        details = data.get("details")
        error.details = dict(details) if isinstance(details, Mapping) else {}
        return error


class UsageError(WeightwireError):
    status, code = 400, "usage"


class AuthError(WeightwireError):
    status, code = 401, "unauthorized"


class ManifestError(WeightwireError):
    status, code = 422, "manifest"


class UnknownTensor(ManifestError):
    code = "unknown_tensor"


class MissingTensor(ManifestError):
    code = "missing_tensor"


class ShapeMismatch(ManifestError):
    code = "shape_mismatch"


class VersionError(WeightwireError):
    status, code = 409, "version"


class BusyError(WeightwireError):
    """`details["holder"]` says who, `details["until"]` is the Unix time at which the lease ends."""

    status, code = 409, "busy"


class AdapterNotFound(WeightwireError):
    status, code = 404, "adapter_not_found"


class UpdateNotFound(WeightwireError):
    status, code = 404, "update_not_found"


class StateError(WeightwireError):
    status, code = 409, "state"


class RoomError(WeightwireError):
    status, code = 507, "room"


class TooLarge(WeightwireError):
    status, code = 413, "too_large"


class TransportError(WeightwireError):
    status, code = 502, "transport"


class VerificationError(WeightwireError):
    status, code = 422, "verification"


class NonFinite(VerificationError):
    code = "non_finite"


class UnsupportedError(WeightwireError):
    status, code = 501, "unsupported"


class SourceError(WeightwireError):
    code = "source"


class EngineError(WeightwireError):
    code = "engine"


class EngineLost(EngineError):
    status, code = 503, "engine_lost"


class DeadlineError(EngineError):
    status, code = 504, "deadline"


class PoisonedError(EngineError):
    status, code = 503, "poisoned"


class PublishError(WeightwireError):
    """Engines ended differently: `outcomes` maps each engine's name to its receipt or its error."""

    code = "publish"

    def __init__(self, message: str, *, outcomes: Mapping[str, Any] | None = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.outcomes = dict(outcomes or {})


def _tree(cls: type[WeightwireError]) -> list[type[WeightwireError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


_BY_CODE = {cls.code: cls for cls in _tree(WeightwireError)}

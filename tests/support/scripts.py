"""What scripts say that tests run as processes of their own."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["last_json"]


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object: vLLM may have more to say while it shuts down."""
    return dict(json.loads([line for line in output.splitlines() if line.startswith("{")][-1]))

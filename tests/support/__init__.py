"""What tests of several rooms share. `tests/conftest.py` puts its folder on the path: `from support import serve`."""

from support.models import same, snapshot, tiny, weights_for
from support.server import Server, serve

__all__ = ["Server", "same", "serve", "snapshot", "tiny", "weights_for"]

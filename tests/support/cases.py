"""How many random cases a test looks at: all that it says, or a quarter, as `make test-fast` chooses."""

import os

_FEW = os.environ.get("WEIGHTWIRE_FEW_CASES") == "1"


def cases(most: int) -> int:
    return max(most // 4, 1) if _FEW else most

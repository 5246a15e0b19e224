"""How a test speaks with a client in a process of its own: one JSON object a line, one line back for each."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any


def raised(exc: BaseException) -> dict[str, Any]:
    """An exception as it was rebuilt: its very class, not what it says it is."""
    cls = type(exc)
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "args": json.loads(json.dumps(exc.args, default=repr))}


def converse(client: Any) -> None:
    """Call the method that each line names until there are no more lines."""
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(client, order.pop("do"))(**order)
        except Exception:  # whatever went wrong is the test's to show
            answer = {"broken": traceback.format_exc()}
        print(json.dumps(answer), flush=True)

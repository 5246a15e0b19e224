"""The worker's log, where the application has none of its own."""

from __future__ import annotations

import logging


def log_to_stderr(level: str) -> None:
    """Show the log, unless the application has arranged for its logging itself: then nothing of it is touched."""
    if logging.root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.root.addHandler(handler)
    logging.root.setLevel(level)
    logging.getLogger("stevedore").setLevel(logging.WARNING)  # at DEBUG it lists every entry point of every scan

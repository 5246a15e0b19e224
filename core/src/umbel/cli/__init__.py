"""The command line: ``umbel``. One module a command, imported when the command is called; the only imports of click."""

from __future__ import annotations

from umbel.cli.group import root


def main() -> None:
    """The script ``umbel``."""
    root(prog_name="umbel")

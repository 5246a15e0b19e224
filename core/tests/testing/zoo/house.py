"""Where wrong drivers live: each is an honest one with one fault, and says which laws it breaks, and no others.

The modules of the zoo are not collected with the other tests, for nearly every animal fails: ``test_zoo`` runs them and
compares.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

MANY: Final = 120
"""How many messages, records and jobs stand for thousands here."""
FULL: Final = os.environ.get("UMBEL_TEST_FULL") == "1"
SHARE: Final = 1 if FULL else 6
"""Of the laws that an animal does not break it is tried with one in so many, each animal with others."""


class House:
    """The animals of one port, and the honest drivers that they descend from."""

    def __init__(self, file: str, cage: type, *honest: type) -> None:
        self.file = Path(file)
        self.cage = cage
        """The contract, fitted to what is quick. Its factory makes ``self.driver``."""
        self.broken: dict[type, set[str]] = {driver: set() for driver in honest}
        """Every driver, and the laws that it breaks."""

    def breaks(self, *laws: str) -> Callable[[type], type]:
        """Put an animal into the house. A law with several cases is named with one (``law[1]``), or with all (``law``)."""

        def register(driver: type) -> type:
            self.broken[driver] = {f"test_{law}" for law in laws}
            return driver

        return register

    def tests(self) -> Mapping[str, Any]:
        """The contract of every driver in here, for the globals of its module."""
        return {
            name(driver): type(
                name(driver),
                (self.cage,),
                {"driver": driver, "__module__": self.cage.__module__, **dict.fromkeys(self._left_out(driver))},
            )
            for driver in self.broken
        }

    def _left_out(self, driver: type) -> list[str]:
        """The laws that a driver is not tried with. An honest one is tried with all."""
        named = {law.partition("[")[0] for law in self.broken[driver]}
        laws = [law for law in dir(self.cage) if law.startswith("test_")] if named else []
        return [law for law in laws if law not in named and zlib.crc32(f"{driver.__name__} {law}".encode()) % SHARE]


def name(driver: type) -> str:
    """The name of a driver's test class."""
    return f"Test{driver.__name__}"

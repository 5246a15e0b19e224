"""A server that is missing skips tests on a person's machine, and fails them in CI."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_absent(
    ci: str, outcome: type[BaseException], absent: Callable[[str], NoReturn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no Redis at localhost"):
        absent("no Redis at localhost")

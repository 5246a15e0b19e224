"""The types that an application's author sees, as ``contract.py`` tells them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = Path(__file__).with_name("contract.py")

MARKED = re.compile(r"# E: ([\w -]+)$")
FOUND = re.compile(r"^contract\.py:(\d+): error: (.*?)\s+\[([\w-]+)\]$", re.MULTILINE)


def test_a_type_checker_says_what_the_contract_says() -> None:
    marked = {
        (number, code)
        for number, line in enumerate(CONTRACT.read_text().splitlines(), 1)
        if (m := MARKED.search(line))
        for code in m[1].split()
    }
    options = ["--config-file", f"{ROOT}/pyproject.toml", "--cache-dir", f"{ROOT}/.mypy_cache", "--no-pretty"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, CONTRACT.name],
        cwd=CONTRACT.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {(int(line), code): message for line, message, code in FOUND.findall(done.stdout)}
    surprising = {key: message for key, message in found.items() if key not in marked}
    assert not surprising, "an error that is not in the contract"
    assert not marked - found.keys(), "an error of the contract that mypy does not find"

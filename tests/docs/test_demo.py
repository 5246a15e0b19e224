"""The demo does what the README says of it, on some of its files and in a folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def demo(folder: Path, files: int, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of it, with lines of its settings changed."""
    shutil.copytree(ROOT / "demo", folder, ignore=shutil.ignore_patterns("*.sqlite3*", "__pycache__"))
    settings = (folder / "umbel.toml").read_text()
    for name, value in changed.items():
        settings, times = re.subn(rf"^{name} = .*$", f"{name} = {value}", settings, flags=re.MULTILINE)
        assert times == 1
    (folder / "umbel.toml").write_text(settings)
    return subprocess.run(
        [sys.executable, folder / "run.py", str(files)],
        env={name: value for name, value in os.environ.items() if not name.startswith("UMBEL_")},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.mark.slow
def test_the_demo_indexes_files_and_shows_the_one_that_failed(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo", 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sent 61 tasks in " in done.stdout
    found = dict(re.findall(r"^  (\S.*?) {2,}(\S.*)$", done.stdout, re.MULTILINE))
    assert (found["files indexed"], found["failed for good"]) == ("60", "1")
    assert int(found["lines"].replace(",", "")) > 1000
    letters = done.stdout.partition("$ umbel dead-letters list\n")[2]
    assert "indexer.index_file" in letters
    assert "SyntaxError" in letters
    assert done.stdout.endswith("\nthe worker has stopped with status 0\n")


@pytest.mark.slow
def test_a_worker_that_is_gone_is_not_waited_for_and_its_words_are_shown(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo", 3, pool='"preforked"')
    assert done.returncode == 1
    assert "the status of the worker is 1, and it said:" in done.stderr
    assert "no pool 'preforked' is installed" in done.stderr

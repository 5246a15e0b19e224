"""What is not needed is not imported: each test counts the modules of a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NOTE = """
import sys
before = set(sys.modules)
def note():
    import json
    with open({file!r}, "w") as file:
        json.dump(sorted(set(sys.modules) - before), file)
"""

DECLARE = """
from umbel import Umbel
app = Umbel("shop", broker="memory://shop", results="memory://shop",
            settings={"worker": {"pool": "threads", "concurrency": 1}})
@app.task
def add(x: int, y: int) -> int:
    return x + y
"""

WORK = """
import threading
worker = app.worker()
values = []
def send():
    try:
        values.append(add.delay(2, 3).get(timeout=20))
    finally:
        worker.request_stop()
sender = threading.Thread(target=send)
sender.start()
status = worker.run()
sender.join()
assert (status, values) == (0, [5]), (status, values)
"""


def modules_after(code: str, tmp_path: Path) -> set[str]:
    """The modules that ``code`` brings into an interpreter that has just started."""
    file = tmp_path / "modules.json"
    script = tmp_path / "script.py"
    script.write_text(NOTE.format(file=str(file)) + code + "\nnote()\n")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads(file.read_text()))


def test_importing_umbel_is_next_to_nothing(tmp_path: Path) -> None:
    brought = modules_after("import umbel", tmp_path)
    assert "umbel" in brought
    assert not brought & {"stevedore", "cattrs", "click", "asyncio", "importlib.metadata", "attrs", "pluggy"}


def test_declaring_a_task_finds_no_plugin_and_reads_no_settings(tmp_path: Path) -> None:
    brought = modules_after(DECLARE, tmp_path)
    assert "umbel.app" in brought
    assert not brought & {
        "stevedore",
        "cattrs",
        "click",
        "importlib.metadata",
        "umbel.worker",
        "umbel.settings.sources",
    }
    assert not {name for name in brought if name.startswith("umbel_")}


def test_a_worker_imports_the_plugins_that_its_settings_name(tmp_path: Path) -> None:
    brought = modules_after(DECLARE + WORK, tmp_path)
    assert {name.partition(".")[0] for name in brought if name.startswith("umbel_")} == {
        "umbel_memory",
        "umbel_json",
        "umbel_threads",
        "umbel_children",  # which the pool is made of
    }
    assert not brought & {"click", "umbel.cli", "umbel.testing", "sqlite3"}

"""A fork in the middle of another thread's import leaves nothing locked in the child."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SLOW = """
    import time
    open("begun", "w").close()
    time.sleep(0.5)
    from umbel.markers import hookimpl
    class Listener:
        @hookimpl
        def umbel_before_task(self): ...
"""
SCRIPT = """
    import os, signal, threading, time, warnings
    from pathlib import Path
    from umbel.plugins.manager import PluginManager

    warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
    other = threading.Thread(target=PluginManager().load_hooks, args=(["slow_plugin:Listener"],))
    other.start()
    end = time.monotonic() + 30
    while not Path("begun").exists() and time.monotonic() < end:
        time.sleep(0.001)
    child = os.fork()
    if not child:
        signal.alarm(5)  # the child would wait for ever
        PluginManager().load_hooks(["slow_plugin:Listener"])
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    other.join()
    PluginManager().load_hooks(["slow_plugin:Listener"])
"""


def test_a_child_can_import_what_another_thread_was_importing(tmp_path: Path) -> None:
    (tmp_path / "slow_plugin.py").write_text(dedent(SLOW))
    done = subprocess.run(
        [sys.executable, "-c", dedent(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "7\n", done.stderr


STUCK = """
    import os, threading, warnings
    from umbel.plugins import loader

    warnings.simplefilter("ignore", DeprecationWarning)
    loader._PATIENCE = 0.1
    held, over = threading.Event(), threading.Event()

    def hold():
        with loader.importing():
            held.set()
            over.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    child = os.fork()
    if not child:
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    over.set()
    other.join()
    with loader.importing():
        print("free")
"""


def test_a_fork_does_not_wait_for_an_import_for_ever(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", dedent(STUCK)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "7\nfree\n", done.stderr

"""The fixtures as a stranger's test suite has them: one line in its conftest, every warning an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

SHOP = """
    from umbel import Umbel

    app = Umbel("shop", broker="redis://production", results="redis://production", settings={"worker.pool": "prefork"})

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="shop.aadd")
    async def aadd(x: int, y: int) -> int:
        return x + y
"""

CONFTEST = """
    import pytest

    pytest_plugins = ["umbel.testing.fixtures"]
"""

OWN = """
    @pytest.fixture
    def umbel_app():
        from shop import app
        return app
"""


def run(folder: Path, **files: str) -> str:
    """What pytest says of a suite of these files; it must pass."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(dedent(text))
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-q"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("UMBEL_", "PYTEST_"))}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_empty_app_is_there_without_more(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        conftest=CONFTEST,
        test_it="""
            def test_it(umbel_worker, umbel_app, umbel_clock):
                task = umbel_app.task(name="one")(lambda: 1)
                assert umbel_worker.app is umbel_app
                assert umbel_worker.clock is umbel_clock is umbel_app.clock
                assert task.delay().get(10) == 1
        """,
    )
    assert "1 passed" in said


def test_the_app_under_test_is_named_by_overriding_one_fixture(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        shop=SHOP,
        conftest=dedent(CONFTEST) + dedent(OWN),
        test_it="""
            import asyncio
            import pytest
            from shop import aadd, add, app

            @pytest.mark.parametrize("n", range(3))
            def test_it_runs(umbel_worker, n):
                assert add.delay(n, 1).get(10) == n + 1
                assert aadd.delay(n, 1).get(10) == n + 1
                assert len(umbel_worker.published) == 2

            def test_nothing_runs(umbel_harness):
                add.delay(2, y=3)
                (call,) = umbel_harness.calls(add)
                assert (list(call.args), call.kwargs) == ([2], {"y": 3})

            def test_inside_an_event_loop(umbel_worker):
                async def main():
                    handle = await add.aapply_async((2, 3), countdown=86_400)
                    await asyncio.to_thread(umbel_worker.advance, days=1)
                    assert await handle == 5
                asyncio.run(main())

            def test_the_app_is_as_it_was():
                assert app.settings.broker.url == "redis://production"
        """,
    )
    assert "6 passed" in said


def test_settings_of_one_module_are_a_fixture_too(tmp_path: Path) -> None:
    run(
        tmp_path,
        shop=SHOP,
        conftest=dedent(CONFTEST) + dedent(OWN),
        test_it="""
            import pytest
            from shop import add

            @pytest.fixture
            def umbel_settings():
                return {"default_queue": "elsewhere"}

            def test_it(umbel_harness):
                add.delay(1, 2)
                assert umbel_harness.published[0].queue == "elsewhere"
        """,
    )

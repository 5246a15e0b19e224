"""The composition root: settings, components made on first use, and nothing shared between two apps."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from umbel import Umbel, hookimpl
from umbel.errors import SettingsError, UmbelError

from .conftest import MakeApp
from .fakes import Fakes


def test_making_an_app_reads_and_makes_nothing(fakes: Fakes) -> None:
    app = Umbel("x", plugins=[fakes], settings={"nonsense": 1})
    assert repr(app) == "<Umbel x>"
    assert fakes.made == []
    with pytest.raises(SettingsError, match="nonsense"):
        _ = app.settings


def test_importing_umbel_imports_nothing_heavy() -> None:
    heavy = ("stevedore", "cattrs", "click", "asyncio", "importlib.metadata", "attrs")
    code = f"import sys, umbel; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_address_of_the_broker_and_of_the_results_may_be_given_by_name(fakes: Fakes) -> None:
    with Umbel("x", plugins=[fakes], broker="fake://b", results="fake://r") as app:
        assert (app.settings.broker.url, app.settings.results.url) == ("fake://b", "fake://r")
        app.send_task("t")
        assert fakes.made[-1] == "fake://b"
    assert fakes.broker.closed == 1


def test_settings_are_nested_or_dotted_and_the_command_line_wins_over_code(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app({"worker": {"prefetch": 3}, "default_queue": "code"})
    file = tmp_path / "mine.toml"
    file.write_text('default_queue = "file"\ntimezone = "Asia/Seoul"\n')
    app.configure(file=file, command_line={"default_queue": "typed"})
    assert (app.settings.worker.prefetch, app.settings.default_queue) == (3, "typed")
    assert app.timezone == ZoneInfo("Asia/Seoul")


def test_an_app_is_configured_before_its_first_use_only(app: Umbel) -> None:
    _ = app.settings
    with pytest.raises(UmbelError, match="app 'shop' has read its settings already"):
        app.configure(command_line={"default_queue": "late"})


def test_every_component_is_made_once_however_many_threads_ask(app: Umbel) -> None:
    seen: dict[str, set[int]] = {}

    def ask() -> None:
        for name in ("plugins", "codec", "result_codec", "client", "gateway", "runtime", "settings"):
            seen.setdefault(name, set()).add(id(getattr(app, name)))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: len(ids) for name, ids in seen.items()} == dict.fromkeys(seen, 1)


def test_the_first_use_may_be_made_by_many_threads_at_once(make_app: MakeApp, fakes: Fakes) -> None:
    faults: list[BaseException] = []

    def use(app: Umbel, number: int, start: threading.Barrier) -> None:
        start.wait(60)
        try:
            if number == 0:
                app.result("x").record()
            else:
                app.send_task("t", serializer=("json", "repr")[number % 2], compression="squeeze")
        except BaseException as exc:
            faults.append(exc)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            app, start = make_app(), threading.Barrier(6)
            threads = [threading.Thread(target=use, args=(app, number, start)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            app.close()
    finally:
        sys.setswitchinterval(before)
    assert faults == []
    assert len(fakes.broker.messages()) == 30 * 5


def test_plugins_are_told_when_the_settings_are_read(make_app: MakeApp) -> None:
    seen: list[str] = []

    class Plugin:
        @hookimpl
        def umbel_configure(self, app: Umbel) -> None:
            seen.append(app.settings.default_queue)

    app = make_app({"default_queue": "q"}, plugins=[Plugin()])
    _ = app.plugins, app.plugins
    assert seen == ["q"]


def test_a_plugin_that_refuses_the_settings_refuses_them_each_time(make_app: MakeApp) -> None:
    class Plugin:
        @hookimpl
        def umbel_configure(self) -> None:
            raise SettingsError(["mine is wrong"])

    app = make_app(plugins=[Plugin()])
    for _ in range(2):
        with pytest.raises(SettingsError, match="mine is wrong"):
            _ = app.plugins


def test_a_disabled_result_store_cannot_be_made(make_app: MakeApp) -> None:
    app = make_app({"results.url": "disabled"})
    with pytest.raises(SettingsError, match=r'\[results\] url is "disabled"'):
        app.make_result_store()


def test_closing_an_app_that_was_never_used_is_harmless(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app()
    app.close()
    app.close()
    assert fakes.made == []


def test_modules_named_in_imports_are_imported(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop_imported.py").write_text("seen = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    make_app({"imports": ["shop_imported"]}).load_tasks()
    assert sys.modules.pop("shop_imported").seen

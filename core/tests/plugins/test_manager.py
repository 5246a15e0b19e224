"""Who takes part: registering, the factories' order, wrappers, observers, contributions."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from umbel import hookspecs
from umbel.errors import PluginApiMismatch, PluginBroken, PluginError, PluginNotFound, SettingsError
from umbel.markers import hookimpl
from umbel.plugins import loader
from umbel.plugins.kinds import KINDS
from umbel.plugins.manager import LOADER, PluginManager
from umbel.ports.serializer import Serializer
from umbel.ports.transport import Transport

from .conftest import DRIVERS, Install


class Plain(Serializer):
    api_version = (1, 0)
    name = "plain"
    content_type = "text/plain"
    content_encoding = "utf-8"

    def dumps(self, value: Any) -> bytes:
        return str(value).encode()

    def loads(self, data: bytes) -> Any:
        return data.decode()


class MakesPlain:
    @hookimpl
    def umbel_make_serializer(self, name: str) -> Serializer | None:
        return Plain() if name == "plain" else None


def names(plugins: PluginManager) -> list[str]:
    return [name for name, _ in plugins.registered()]


# --- lightness, registering ---


def test_the_manager_is_light() -> None:
    code = """if True:
        import sys
        from umbel.plugins.manager import PluginManager
        from umbel.markers import hookimpl
        plugins = PluginManager()
        plugins.observer("umbel_before_task")
        heavy = {"stevedore", "importlib.metadata", "cattrs", "asyncio", "click"}
        assert "pluggy" in sys.modules
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_object_in_code_costs_neither_stevedore_nor_a_scan() -> None:
    code = """if True:
        import sys
        from umbel.plugins.manager import PluginManager
        from umbel.ports.serializer import Serializer
        class Mine(Serializer):
            def dumps(self, value): return b""
            def loads(self, data): return None
        PluginManager().make_serializer(Mine())
        assert not {"stevedore", "importlib.metadata"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_managers_share_nothing() -> None:
    one, other = PluginManager(), PluginManager()
    one.register(MakesPlain(), "mine")
    assert names(one) == [LOADER, "mine"]
    assert names(other) == [LOADER]


def test_register_and_unregister() -> None:
    plugins, plugin = PluginManager(), MakesPlain()
    plugins.register(plugin)
    assert plugins.registered() == [(LOADER, loader), ("MakesPlain", plugin)]
    with pytest.raises(PluginError, match="registered already, as 'MakesPlain'"):
        plugins.register(plugin, "again")
    with pytest.raises(PluginError, match="a plugin named 'MakesPlain' is registered already"):
        plugins.register(MakesPlain(), "MakesPlain")
    plugins.register(MakesPlain())
    assert names(plugins) == [LOADER, "MakesPlain", "MakesPlain#2"]
    plugins.unregister(plugin)
    assert names(plugins) == [LOADER, "MakesPlain#2"]
    with pytest.raises(PluginError, match="is not registered"):
        plugins.unregister(plugin)


def test_a_class_is_refused() -> None:
    with pytest.raises(PluginError, match="MakesPlain is a class"):
        PluginManager().register(MakesPlain)


def test_a_disabled_plugin_is_not_registered() -> None:
    plugins = PluginManager(disabled=["mine"])
    plugins.register(MakesPlain(), "mine")
    assert names(plugins) == [LOADER]
    with pytest.raises(PluginNotFound):
        plugins.make_serializer("plain")


def test_plugins_are_compared_by_identity() -> None:
    class Odd:
        def __init__(self, equal: bool) -> None:
            self.equal = equal

        def __eq__(self, other: object) -> bool:
            if self.equal:
                return True
            raise RuntimeError("compared")

        __hash__ = None  # type: ignore[assignment]  # on purpose: a plugin that cannot be hashed

        @hookimpl
        def umbel_before_task(self) -> None: ...

    plugins, first = PluginManager(), Odd(equal=True)
    plugins.register(first)
    plugins.register(Odd(equal=True))
    plugins.register(Odd(equal=False))
    plugins.unregister(first)
    assert len(plugins.registered()) == 3
    assert len(plugins.observer("umbel_before_task")._listeners) == 2


def test_names_without_the_prefix_are_never_looked_at() -> None:
    class Touchy:
        @property
        def attribute(self) -> None:
            raise AssertionError("looked at")

    PluginManager().register(Touchy())


def impl(name: str, **options: Any) -> Any:
    def wrapper() -> Any:
        yield

    def function() -> None: ...

    chosen = wrapper if options.get("wrapper") or options.get("hookwrapper") else function
    return type("Plugin", (), {name: staticmethod(hookimpl(**options)(chosen))})()


def test_a_hook_that_does_not_exist_is_an_error_unless_optional() -> None:
    plugins = PluginManager()
    with pytest.raises(
        PluginBroken, match="'p' is broken: there is no hook 'umbel_befor_task': did you mean 'umbel_before_task'"
    ):
        plugins.register(impl("umbel_befor_task"), "p")
    assert names(plugins) == [LOADER]
    plugins.register(impl("umbel_befor_task", optionalhook=True), "p")
    assert names(plugins) == [LOADER, "p"]


OBSERVERS = [
    name
    for name in vars(hookspecs)
    if name.startswith("umbel_") and not name.startswith(("umbel_make_", "umbel_add_", "umbel_configure"))
]


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize("hook", [*OBSERVERS, "umbel_add_steps", "umbel_configure"])
def test_only_factories_may_be_wrapped(hook: str, style: str) -> None:
    plugins = PluginManager()
    with pytest.raises(PluginBroken, match=f"{hook} cannot be wrapped"):
        plugins.register(impl(hook, **{style: True}), "p")
    assert names(plugins) == [LOADER]
    plugins.register(impl("umbel_make_pool", **{style: True}), "p")


def test_the_factories_are_the_firstresult_hooks() -> None:
    factories = {n for n, spec in vars(hookspecs).items() if getattr(spec, "umbel_spec", {}).get("firstresult")}
    assert factories == {kind.hook for kind in KINDS if kind.port} | {"umbel_make_timetable"}
    assert all(name.startswith("umbel_make_") for name in factories)


def test_an_unknown_argument_is_an_error() -> None:
    class Asks:
        @hookimpl
        def umbel_before_task(self, nonsense: object) -> None: ...

    with pytest.raises(PluginBroken, match=r"'p' is broken(.|\n)*nonsense"):
        PluginManager().register(Asks(), "p")


def test_a_coroutine_function_is_an_error() -> None:
    class Waits:
        @hookimpl
        async def umbel_before_task(self) -> None: ...

    with pytest.raises(PluginBroken, match="umbel_before_task is a coroutine function"):
        PluginManager().register(Waits(), "p")


# --- load_hooks ---


LISTENER = """
    from umbel.markers import hookimpl
    calls = []
    class Listener:
        @hookimpl
        def umbel_before_task(self, request): calls.append(request)
    @hookimpl
    def umbel_before_task(request): calls.append(("module", request))
"""


def test_listeners_are_loaded_by_name_and_nothing_else_is(install: Install) -> None:
    install("umbel-ear", {"umbel.hooks": {"ear": "umbel_ear:Listener"}}, {"umbel_ear": LISTENER})
    install("umbel-nose", {"umbel.hooks": {"nose": "umbel_nose:Listener"}}, {"umbel_nose": LISTENER})
    plugins = PluginManager()
    plugins.load_hooks(["ear"])
    plugins.load_hooks(["ear"])
    plugins.observer("umbel_before_task")(request=7)
    assert sys.modules["umbel_ear"].calls == [7]
    assert names(plugins) == [LOADER, "ear"]
    assert "umbel_nose" not in sys.modules


@pytest.mark.parametrize(
    ("path", "heard"), [("my.ears:Listener", 7), ("my.ears", ("module", 7)), ("my.ears:", ("module", 7))]
)
def test_listeners_are_loaded_by_path(install: Install, path: str, heard: object) -> None:
    install("nothing", {}, {"my.ears": LISTENER})
    plugins = PluginManager()
    plugins.load_hooks([path])
    plugins.observer("umbel_before_task")(request=7)
    assert sys.modules["my.ears"].calls == [heard]
    assert names(plugins) == [LOADER, path]


def test_the_first_named_is_called_first(install: Install) -> None:
    source = """
        from umbel.markers import hookimpl
        @hookimpl
        def umbel_add_middleware(): return [__name__]
    """
    install("nothing", {}, {"my.outer": source, "my.inner": source})
    plugins = PluginManager()
    plugins.load_hooks(["my.outer", "my.inner"])
    assert plugins.contributions("umbel_add_middleware", app=None) == ["my.outer", "my.inner"]


def test_a_disabled_or_replaced_listener_is_not_imported(install: Install) -> None:
    install(
        "umbel-ear",
        {"umbel.hooks": {"ear": "umbel_ear:Listener", "ear2": "umbel_ear:Listener"}},
        {"umbel_ear": LISTENER},
    )
    plugins = PluginManager(disabled=["ear"])
    plugins.register(MakesPlain(), "ear2")
    plugins.load_hooks(["ear", "ear2"])
    assert "umbel_ear" not in sys.modules


@pytest.mark.parametrize(
    ("name", "source", "error", "sentence"),
    [
        ("eer", LISTENER, PluginNotFound, r"no hook 'eer' is installed \(\[plugins\] hooks\); did you mean 'ear'\?"),
        ("ear", "1/0", PluginBroken, r"hook 'ear' \(umbel-ear 1.0\) is broken: .*ZeroDivisionError"),
        (
            "ear",
            LISTENER + "\n    Listener.api_version = (2, 0)",
            PluginApiMismatch,
            r"API 2.0, and this umbel-core has 1.0",
        ),
        ("ear", LISTENER + "\n    Listener.__init__ = None", PluginBroken, r"hook 'ear' .* raised TypeError"),
        ("my.ears", "", PluginNotFound, r"hook 'my.ears' cannot be found: there is no module 'my'"),
    ],
)
def test_what_is_wrong_with_a_listener(
    install: Install, name: str, source: str, error: type[Exception], sentence: str
) -> None:
    install("umbel-ear", {"umbel.hooks": {"ear": "umbel_ear:Listener"}}, {"umbel_ear": source})
    plugins = PluginManager()
    with pytest.raises(error, match=sentence):
        plugins.load_hooks([name])
    assert names(plugins) == [LOADER]


WITH_OPTIONS = """
    from attrs import frozen
    @frozen(kw_only=True)
    class Options:
        port: int
        host: str = "here"
    class Listener:
        Options = Options
        def __init__(self, *, options=None): self.options = options
"""


def test_a_listener_has_options_of_its_own(install: Install) -> None:
    install("umbel-ear", {"umbel.hooks": {"ear": "umbel_ear:Listener"}}, {"umbel_ear": WITH_OPTIONS})
    for given, told in (({"ear": {"port": "9"}}, (9, "here")), ({}, None)):
        plugins = PluginManager(options=given)
        plugins.load_hooks(["ear"])
        options = dict(plugins.registered())["ear"].options  # type: ignore[attr-defined]  # the class above
        assert (options and (options.port, options.host)) == told


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        (WITH_OPTIONS, {"part": 9}, r"\[plugins.options.ear\].*part is not a setting; did you mean port"),
        (LISTENER, {"port": 9}, r"\[plugins.options.ear\] is given, but hook 'ear' \(umbel-ear 1.0\) takes no options"),
        ("Listener = object()", {"port": 9}, r"takes no options"),
    ],
)
def test_options_that_a_listener_does_not_take(
    install: Install, source: str, options: dict[str, Any], sentence: str
) -> None:
    install("umbel-ear", {"umbel.hooks": {"ear": "umbel_ear:Listener"}}, {"umbel_ear": source})
    plugins = PluginManager(options={"ear": options})
    with pytest.raises(SettingsError, match=sentence):
        plugins.load_hooks(["ear"])
    assert names(plugins) == [LOADER]


def test_a_serializer_has_options_of_its_own(install: Install) -> None:
    source = """
        from attrs import frozen
        from umbel.ports.serializer import Serializer
        @frozen
        class Options:
            key: str = "none"
        class Signed(Serializer):
            name, content_type, content_encoding = "signed", "application/data", "utf-8"
            Options = Options
            def __init__(self, *, options=None): self.key = (options or Options()).key
            def dumps(self, value): return b""
            def loads(self, data): return None
    """
    install("umbel-signed", {"umbel.serializers": {"signed": "umbel_signed:Signed"}}, {"umbel_signed": source})
    for given, key in (({"signed": {"key": "k"}}, "k"), ({}, "none")):
        made: Any = PluginManager(options=given).make_serializer("signed")
        assert made.key == key
    with pytest.raises(SettingsError, match=r"\[plugins.options.signed\].*kee is not a setting"):
        PluginManager(options={"signed": {"kee": "k"}}).make_serializer("signed")


# --- factories ---


def test_the_applications_factory_wins_and_lets_the_rest_fall_through(install: Install) -> None:
    entry_points = {"umbel.serializers": {"plain": "umbel_x:FakeSerializer", "fake": "umbel_x:FakeSerializer"}}
    install("umbel-x", entry_points, {"umbel_x": DRIVERS})
    plugins = PluginManager()
    plugins.register(MakesPlain())
    assert type(plugins.make_serializer("plain")) is Plain
    assert "umbel_x" not in sys.modules
    assert plugins.make_serializer("fake").name == "fake"


def test_without_the_loader_entry_points_are_out_of_reach(install: Install) -> None:
    install("umbel-x", {"umbel.serializers": {"fake": "umbel_x:FakeSerializer"}}, {"umbel_x": DRIVERS})
    plugins = PluginManager(disabled=["entry-points"])
    plugins.register(MakesPlain())
    assert type(plugins.make_serializer("plain")) is Plain
    with pytest.raises(PluginNotFound, match=r"no plugin makes the serializer 'fake' .* disable has 'entry-points'"):
        plugins.make_serializer("fake")
    assert "umbel_x" not in sys.modules


@pytest.mark.parametrize("disabled", ["fake", "serializer:fake"])
def test_a_disabled_driver_is_neither_made_nor_imported(install: Install, disabled: str) -> None:
    install("umbel-x", {"umbel.serializers": {"fake": "umbel_x:FakeSerializer"}}, {"umbel_x": DRIVERS})
    with pytest.raises(PluginError, match=rf"serializer 'fake' .* is disabled: \[plugins\] disable has '{disabled}'"):
        PluginManager(disabled=[disabled]).make_serializer("fake")
    assert "umbel_x" not in sys.modules


def test_a_wrapper_goes_round_any_driver(install: Install) -> None:
    class Shouting(Plain):
        def __init__(self, inner: Serializer) -> None:
            self.inner = inner

        def dumps(self, value: Any) -> bytes:
            return self.inner.dumps(value).upper()

    class Shouts:
        @hookimpl(wrapper=True)
        def umbel_make_serializer(self) -> Any:
            return Shouting((yield))

    install("umbel-x", {"umbel.serializers": {"fake": "umbel_x:FakeSerializer"}}, {"umbel_x": DRIVERS})
    plugins = PluginManager()
    plugins.register(Shouts())
    made = plugins.make_serializer("fake")
    assert made.dumps("a") == b"'A'"
    assert plugins.registered()[-1] == ("serializer:fake", made)


def test_a_driver_hears_hooks_and_is_adopted_once() -> None:
    class Listens(Plain):
        heard: list[object] = []

        @hookimpl
        def umbel_worker_stopping(self, worker: object) -> None:
            self.heard.append(worker)

    plugins, serializer = PluginManager(), Listens()
    assert plugins.make_serializer(serializer) is serializer
    assert plugins.make_serializer(serializer) is serializer
    assert len(plugins.registered()) == 2
    plugins.observer("umbel_worker_stopping")(worker="w")
    assert serializer.heard == ["w"]


def test_drivers_of_one_name_are_told_apart() -> None:
    plugins = PluginManager()
    plugins.register(MakesPlain())
    plugins.make_serializer("plain")
    plugins.make_serializer("plain")
    assert names(plugins)[2:] == ["serializer:plain", "serializer:plain#2"]


def test_the_password_is_not_in_a_drivers_name(install: Install) -> None:
    install("umbel-x", {"umbel.transports": {"x": "umbel_x:FakeTransport"}}, {"umbel_x": DRIVERS})
    plugins = PluginManager()
    plugins.make_transport("x://user:secret@host")
    assert names(plugins)[-1] == "transport:x"


def test_a_class_in_code_is_constructed(install: Install) -> None:
    install("umbel-x", {}, {"umbel_x": DRIVERS})
    from umbel_x import FakeTransport  # type: ignore[import-not-found]  # written by this test

    plugins = PluginManager()
    transport = plugins.make_transport(FakeTransport)
    assert isinstance(transport, Transport)
    assert transport.url == ""
    assert type(plugins.make_serializer(Plain)) is Plain
    assert names(plugins) == [LOADER, "transport:FakeTransport", "serializer:Plain"]


@pytest.mark.parametrize("wrong", [42, object, Plain])
def test_what_is_not_of_the_port_is_refused(wrong: Any) -> None:
    plugins = PluginManager()
    with pytest.raises(PluginBroken, match=r"is not a subclass of umbel.ports.pool.Pool \(\[worker\] pool\)"):
        plugins.make_pool(wrong)
    assert names(plugins) == [LOADER]


def test_what_a_factory_returns_is_checked_and_its_distribution_named(install: Install) -> None:
    source = """
        from umbel.markers import hookimpl
        from umbel.ports.serializer import Serializer
        class Late(Serializer):
            api_version = (1, 7)
            def dumps(self, value): ...
            def loads(self, data): ...
        @hookimpl
        def umbel_make_serializer(name):
            return Late() if name == "late" else "nonsense"
    """
    install("acme-late", {"umbel.hooks": {"late": "acme_late"}}, {"acme_late": source}, version="3.1")
    plugins = PluginManager()
    plugins.load_hooks(["late"])
    with pytest.raises(
        PluginApiMismatch, match=r"serializer 'late' \(acme-late 3.1\) is for plugin API 1.7, .* has 1.0"
    ):
        plugins.make_serializer("late")
    with pytest.raises(PluginBroken, match=r"serializer 'other' is broken: builtins.str is not a subclass of"):
        plugins.make_serializer("other")


# --- observers ---


def listener(function: Any, hook: str = "umbel_after_task") -> Any:
    return type("Listener", (), {hook: staticmethod(hookimpl(function))})()


def test_an_observer_nobody_hears_is_false() -> None:
    plugins = PluginManager()
    assert not any(plugins.observer(hook) for hook in OBSERVERS)
    plugins.register(listener(lambda: None))
    assert plugins.observer("umbel_after_task")


def test_listeners_get_what_they_ask_for_in_pluggys_order() -> None:
    heard: list[object] = []
    plugins = PluginManager()
    plugins.register(listener(lambda: heard.append("first")))
    plugins.register(listener(lambda outcome: heard.append(outcome)))
    plugins.register(listener(lambda outcome, request: heard.append((request, outcome))))
    plugins.observer("umbel_after_task")(request=1, outcome=2)
    assert heard == [(1, 2), 2, "first"]


def test_one_failing_listener_harms_nobody_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def fail() -> None:
        raise ValueError("bad listener")

    plugins = PluginManager()
    plugins.register(listener(lambda: heard.append("a")), "a")
    plugins.register(listener(fail), "clumsy")
    plugins.register(listener(lambda: heard.append("b")), "b")
    with caplog.at_level(logging.ERROR, logger="umbel.plugins"):
        plugins.observer("umbel_after_task")(request=1, outcome=2)
    assert heard == ["b", "a"]
    (record,) = caplog.records
    assert record.name == "umbel.plugins"
    assert record.getMessage() == "plugin 'clumsy' failed in umbel_after_task"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


def test_an_observer_lets_go_what_is_no_error() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    plugins = PluginManager()
    plugins.register(listener(stop))
    with pytest.raises(KeyboardInterrupt):
        plugins.observer("umbel_after_task")(request=1, outcome=2)


def test_an_observer_is_frozen() -> None:
    heard: list[int] = []
    plugins = PluginManager()
    before = plugins.observer("umbel_after_task")
    plugins.register(listener(lambda: heard.append(1)))
    before(request=1, outcome=2)
    assert not before
    assert not heard


@pytest.mark.parametrize(
    "hook", ["umbel_nonsense", "umbel_befor_task", "umbel_make_pool", "umbel_add_steps", "register"]
)
def test_what_cannot_be_observed_is_an_error(hook: str) -> None:
    plugins = PluginManager()
    plugins.register(impl("umbel_nonsense", optionalhook=True))
    with pytest.raises(PluginError, match=hook):
        plugins.observer(hook)


# --- contributions ---


def test_contributions_are_flattened() -> None:
    plugins = PluginManager()
    plugins.register(listener(lambda worker: [worker, "a"], "umbel_add_steps"))
    plugins.register(listener(lambda: None, "umbel_add_steps"))
    plugins.register(listener(lambda: ("b",), "umbel_add_steps"))
    assert plugins.contributions("umbel_add_steps", worker="w") == ["b", "w", "a"]


def test_a_failing_contribution_names_its_plugin() -> None:
    plugins = PluginManager()
    plugins.register(listener(lambda: 1 / 0, "umbel_add_steps"), "clumsy")
    with pytest.raises(PluginBroken, match="plugin 'clumsy' failed in umbel_add_steps: ZeroDivisionError") as caught:
        plugins.contributions("umbel_add_steps", worker="w")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("wrong", ["text", 7, {"a"}])
def test_a_contribution_that_is_no_list_names_its_plugin(wrong: object) -> None:
    plugins = PluginManager()
    plugins.register(listener(lambda: wrong, "umbel_add_steps"), "clumsy")
    with pytest.raises(PluginBroken, match=r"plugin 'clumsy' returned .* from umbel_add_steps, not a list"):
        plugins.contributions("umbel_add_steps", worker="w")


@pytest.mark.parametrize("hook", ["umbel_add_nonsense", "umbel_before_task"])
def test_what_takes_no_contribution_is_an_error(hook: str) -> None:
    with pytest.raises(PluginError, match=hook):
        PluginManager().contributions(hook)


def test_configure_calls_everybody() -> None:
    heard: list[object] = []
    plugins = PluginManager()
    plugins.register(listener(lambda app: heard.append(app), "umbel_configure"))
    plugins.register(listener(lambda: heard.append("b"), "umbel_configure"))
    plugins.configure("app")  # type: ignore[arg-type]  # any object will do as an app here
    assert heard == ["b", "app"]


def test_configure_names_who_failed_and_lets_settings_errors_through() -> None:
    def complain() -> None:
        raise SettingsError(["[sentry] dsn is missing"])

    plugins = PluginManager()
    clumsy, strict = (listener(f, "umbel_configure") for f in (lambda: 1 / 0, complain))
    plugins.register(clumsy, "clumsy")
    with pytest.raises(PluginBroken, match="'clumsy' failed in umbel_configure"):
        plugins.configure("app")  # type: ignore[arg-type]  # any object will do as an app here
    plugins.register(strict, "strict")
    with pytest.raises(SettingsError, match="dsn is missing"):
        plugins.configure("app")  # type: ignore[arg-type]  # any object will do as an app here


# --- threads ---


def test_components_are_made_one_at_a_time_from_any_thread() -> None:
    inside = threading.Semaphore(1)

    class Careful:
        @hookimpl
        def umbel_make_serializer(self, name: str) -> Any:
            assert inside.acquire(blocking=False), "two threads are inside"
            time.sleep(0.002)
            inside.release()
            return Plain()

    plugins = PluginManager()
    plugins.register(Careful())
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: plugins.make_serializer("fake"), range(16)))
    assert len({id(one) for one in made}) == 16
    assert len(plugins.registered()) == 16 + 2


def test_factories_are_named_in_the_order_of_asking() -> None:
    plugins = PluginManager()
    plugins.register(MakesPlain(), "first")
    factories = plugins.factories("umbel_make_serializer")
    assert [factory.plugin for factory in factories] == ["first", LOADER]
    assert factories[1].arguments == ("name", "options")

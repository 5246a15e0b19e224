"""Which app a name means, and under which name another process finds an app."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from umbel.app import MAIN_MODULES, Umbel
from umbel.errors import UmbelError

executing: set[str] = set()
"""Scripts that are being run at this moment, to import the app that they hold."""


def find_app(reference: str) -> Umbel:
    """Import the app named ``module``, ``module:attribute`` (with dots for what is deeper) or ``file.py:attribute``.

    Without an attribute, the module must hold exactly one app, or one named ``app``. Raises ``UmbelError``.
    """
    place, _, attribute = reference.partition(":")
    module = _run_file(place) if place.endswith(".py") else import_module_or_explain(place, "-A/--app")
    if attribute:
        found = module
        for part in attribute.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, Umbel):
            raise UmbelError(f"{reference!r} is {'not there' if found is None else 'not an Umbel app'}")
    else:
        apps = {id(v): v for v in vars(module).values() if isinstance(v, Umbel)}
        named = getattr(module, "app", None)
        if isinstance(named, Umbel):
            found = named
        elif len(apps) == 1:
            found = next(iter(apps.values()))
        else:
            raise UmbelError(
                f"module {place!r} holds {len(apps) or 'no'} apps; name one as {place}:attribute"
                if apps
                else f"module {place!r} holds no Umbel app"
            )
    found.reference = reference
    return found


def import_module_or_explain(module: str, setting: str) -> Any:
    """Import ``module``, or say in one sentence why that fails. ``setting``: what named it. Raises ``UmbelError``."""
    try:
        return import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module == exc.name or module.startswith(exc.name + ".")):
            raise UmbelError(
                f"there is no module {module!r} ({setting}); modules are looked for in {os.getcwd()} and sys.path"
            ) from exc
        raise UmbelError(f"module {module!r} ({setting}) needs {exc.name!r}, which is not installed") from exc
    except UmbelError:
        raise
    except (Exception, SystemExit) as exc:  # a user's module may raise anything while it is imported
        raise UmbelError(f"module {module!r} ({setting}) cannot be imported: {type(exc).__name__}: {exc}") from exc


def _run_file(place: str) -> Any:
    """A script, run as a module of its own name once in this process. Raises ``UmbelError``."""
    path = Path(place).resolve()
    for name in reversed(MAIN_MODULES):
        known = sys.modules.get(name)
        if known is not None and (file := getattr(known, "__file__", None)) and Path(file).resolve() == path:
            return known
    name = MAIN_MODULES[1]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UmbelError(f"there is no script {place!r}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    executing.add(name)
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        del sys.modules[name]
        if isinstance(exc, UmbelError) or not isinstance(exc, Exception):
            raise
        raise UmbelError(f"script {place!r} cannot be run: {type(exc).__name__}: {exc}") from exc
    finally:
        executing.discard(name)
    return module


def locate(app: Umbel) -> str:
    """``module:attribute`` (or ``file.py:attribute``) under which another process can import this app.

    Raises ``UmbelError`` where it hangs in no module.
    """
    if app.reference is None:
        # A script may have imported the app from its own module: that module comes first.
        modules = sorted(sys.modules.items(), key=lambda item: item[0] in MAIN_MODULES)
        for module_name, module in modules:
            for attribute, value in list(vars(module).items()) if module else ():
                if value is app and (file := getattr(module, "__file__", None)):
                    where = str(Path(file).resolve()) if module_name in MAIN_MODULES else module_name
                    app.reference = f"{where}:{attribute}"
                    return f"{where}:{attribute}"
        raise UmbelError(
            f"app {app.name!r} is no module's attribute, so a child process cannot import it: make it one, or use "
            'a pool without processes ([worker] pool = "threads")'
        )
    return app.reference

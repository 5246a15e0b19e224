"""Every hook and every method of a port is documented, and has a test that would notice its removal.

What a test uses is read from its syntax tree: a hook is used where it is implemented, for a plugin that implements a hook
which is not there is refused; a method of a port is used where a file that is about that port calls or reads it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import umbel.ports
from umbel import hookspecs
from umbel.plugins.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = ROOT / "core/src/umbel/testing/contracts"
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("umbel_"))

EXCEPTIONS: Mapping[str, str] = {}
"""Hooks and methods (``umbel_x``, ``Transport.publish``) that no test uses, each with the reason."""


# --- what there is --------------------------------------------------------------------------------


def methods() -> Iterator[tuple[str, str, Any]]:
    """Port module, ``Class.method``, and the function behind it, of every public method that a driver or a caller has."""
    for module_info in pkgutil.iter_modules(umbel.ports.__path__):
        module = importlib.import_module(f"umbel.ports.{module_info.name}")
        for cls in vars(module).values():
            if not (inspect.isclass(cls) and cls.__module__ == module.__name__) or cls.__name__.startswith("_"):
                continue
            for name, member in vars(cls).items():
                function = member.fget if isinstance(member, property) else member
                if inspect.isfunction(function) and not name.startswith("_"):
                    yield module_info.name, f"{cls.__name__}.{name}", function


METHODS = list(methods())


# --- what the tests use ---------------------------------------------------------------------------


@cache
def trees() -> Mapping[Path, ast.Module]:
    """Every file of tests, the conformance kit's included."""
    places = [
        CONTRACTS,
        ROOT / "core/tests",
        ROOT / "tests",
        *ROOT.glob("plugins/*/tests"),
        *ROOT.glob("contrib/*/tests"),
    ]
    return {path: ast.parse(path.read_text()) for place in places for path in sorted(place.rglob("*.py"))}


@cache
def used(path: Path) -> frozenset[str]:
    """The attributes that a file reads or calls."""
    return frozenset(
        node.attr
        for node in ast.walk(trees()[path])
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    )


@cache
def implemented() -> Mapping[str, list[Path]]:
    """The hooks that test files implement, and where."""
    found: dict[str, list[Path]] = {}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any("hookimpl" in ast.unparse(d) for d in node.decorator_list):
                found.setdefault(node.name, []).append(path)
    return found


@cache
def about(port: str) -> frozenset[Path]:
    """The files that are about a port: its laws in the kit, those that import it, the tests of its drivers."""
    group = {kind.port.partition(":")[0].rpartition(".")[2]: kind.group for kind in KINDS if kind.port}.get(port)
    drivers = [
        path.parent
        for path in ROOT.glob("plugins/*/pyproject.toml")
        if group in tomllib.loads(path.read_text())["project"].get("entry-points", {})
    ]
    return frozenset(
        path
        for path, tree in trees().items()
        if (path.is_relative_to(CONTRACTS) and path.name.startswith(port))
        or any(path.is_relative_to(driver) for driver in drivers)
        or any(isinstance(n, ast.ImportFrom) and n.module == f"umbel.ports.{port}" for n in ast.walk(tree))
    )


def is_tested(port: str, method: str) -> bool:
    return any(method.rpartition(".")[2] in used(path) for path in about(port))


# --- the laws -------------------------------------------------------------------------------------


def test_there_is_something_to_check() -> None:
    assert len(HOOKS) >= 20
    assert len(METHODS) >= 60
    assert {"Transport.publish", "Pool.free", "Scheduler.lead", "Clock.time"} <= {name for _, name, _ in METHODS}


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_tested(hook: str, reference: Mapping[str, str]) -> None:
    assert inspect.getdoc(getattr(hookspecs, hook)), f"{hook} has no docstring"
    assert f"def {hook}(" in reference["hooks"]
    assert bool(implemented().get(hook)) != (hook in EXCEPTIONS), f"no test implements {hook}"


@pytest.mark.parametrize(("port", "method", "function"), METHODS, ids=[name for _, name, _ in METHODS])
def test_every_method_of_a_port_is_documented_and_tested(
    port: str, method: str, function: Any, reference: Mapping[str, str]
) -> None:
    assert inspect.getdoc(function) or promised_elsewhere(port, method), f"{method} has no docstring"
    assert f"# {method}\n" in reference["ports"]
    assert is_tested(port, method) != (method in EXCEPTIONS), f"no test that is about the port {port} uses {method}"


def promised_elsewhere(port: str, method: str) -> bool:
    """Whether a protocol of the same module documents the method: what implements a protocol keeps its promise."""
    name = method.rpartition(".")[2]
    return any(
        getattr(cls, "_is_protocol", False) and inspect.getdoc(vars(cls).get(name))
        for cls in vars(importlib.import_module(f"umbel.ports.{port}")).values()
        if inspect.isclass(cls) and name in vars(cls)
    )


@pytest.mark.parametrize("port", ["transport", "result_store", "serializer", "compressor", "pool", "scheduler"])
def test_the_kit_alone_uses_every_abstract_method(port: str) -> None:
    """Of a driver written elsewhere, the kit is the only test."""
    laws = [path for path in about(port) if path.is_relative_to(CONTRACTS)]
    assert laws
    together = frozenset().union(*(used(path) for path in laws))
    abstract = {name.rpartition(".")[2] for at, name, f in METHODS if at == port and hasattr(f, "__isabstractmethod__")}
    assert abstract
    assert abstract <= together


def test_every_exception_has_its_reason_and_is_one() -> None:
    known = {*HOOKS, *(name for _, name, _ in METHODS)}
    assert all(name in known and reason for name, reason in EXCEPTIONS.items())


def test_a_name_that_no_test_uses_would_be_found() -> None:
    assert not is_tested("transport", "Transport.fly")
    assert "umbel_make_bird" not in implemented()


@pytest.fixture(scope="module")
def reference() -> Mapping[str, str]:
    """The generated pages on hooks and ports."""
    spec = importlib.util.spec_from_file_location("umbel_docs_generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return {name: generate.PAGES[name]() for name in ("hooks", "ports")}

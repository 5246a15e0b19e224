"""Which laws of the conformance kit a plugin's tests carry out, as the sources of both say it; nothing is run here.

A law whose subject is not declared ends at a guard: ``if not bench.capabilities.join: …; return``. What stands before that
``return`` is the test of the clean refusal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from attrs import frozen
from writing import KERNEL, Function

CONTRACTS: Final = KERNEL / "testing" / "contracts"

Fate = Literal["kept", "refused", "not declared", "not tried", "beside the point"]


@frozen
class Trial:
    """One law, and what becomes of it with one driver."""

    law: str
    """Name of the test."""
    fate: Fate
    about: str = ""
    """The capability, or the fixture, that decided so."""


@frozen
class Suite:
    """One test class of a plugin that subclasses a contract of the kit."""

    name: str
    contract: str
    own: frozenset[str]
    """Fixtures and tests that it gives itself."""


def suites(tests: Path) -> list[Suite]:
    """The contract tests of a plugin, in the order of its files."""
    trees = [ast.parse(path.read_text()) for path in sorted(tests.glob("**/*.py"))]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for name, cls in classes.items():
        family = list(_family(cls, classes))
        contract = next((base for each in family for base in _bases(each) if base in _contracts()), None)
        if contract is not None and name.startswith("Test"):
            own = {node.name for each in family for node in each.body if isinstance(node, Function)}
            found.append(Suite(name, contract, frozenset(own)))
    return found


def trials(contract: str, driver: Any, capabilities: Mapping[str, Any], suite: Suite) -> list[Trial]:
    """What becomes of each law of a contract, in the order of the kit."""
    laws = [
        node
        for cls in _family(_contracts()[contract], _contracts())
        for node in cls.body
        if isinstance(node, Function) and node.name.startswith("test_")
    ]
    return [_tried(law, driver, capabilities, suite) for law in laws]


def sentence(law: str) -> str:
    """A law's name as prose."""
    words = law.removeprefix("test_").replace("_", " ")
    return words[0].upper() + words[1:]


def _tried(law: Function, driver: Any, capabilities: Mapping[str, Any], suite: Suite) -> Trial:
    for guard in ast.walk(law):
        if not (isinstance(guard, ast.If) and isinstance(end := guard.body[-1], ast.Return) and end.value is None):
            continue
        reasons = list(_reasons(guard.test, driver, capabilities, suite))
        if None in reasons:  # it depends on what the law itself has made
            assert len(guard.body) > 1, (
                f"{law.name}: line {guard.lineno} ends it for a reason that is not understood here"
            )
        elif reasons:
            fate, about = next(filter(None, reasons))
            return Trial(law.name, "refused" if fate == "not declared" and len(guard.body) > 1 else fate, about)
    return Trial(law.name, "kept")


def _reasons(
    test: ast.expr, driver: Any, capabilities: Mapping[str, Any], suite: Suite
) -> Iterator[tuple[Fate, str] | None]:
    """Why a guard's condition holds, with the name that makes it so; nothing: it does not hold; None: nobody can say."""
    match test:
        case ast.BoolOp(op=op, values=values):
            parts = [list(_reasons(value, driver, capabilities, suite)) for value in values]
            if isinstance(op, ast.Or) or all(parts):
                yield from (reason for part in parts for reason in part)
        case ast.UnaryOp(op=ast.Not(), operand=ast.Attribute(attr=name) as asked):
            if not _value(asked, driver, capabilities):
                yield "not declared", name
        case ast.Attribute(attr=name):
            if _value(test, driver, capabilities):
                yield "beside the point", name
        case ast.Compare(left=ast.Name(id=name), ops=[ast.Is()]) if name in _fixtures():
            if name not in suite.own:
                yield "not tried", name
        case _:
            yield None


def _value(asked: ast.Attribute, driver: Any, capabilities: Mapping[str, Any]) -> object:
    """``bench.capabilities.x`` is declared; ``serializer.x`` is said by the driver."""
    if isinstance(asked.value, ast.Attribute) and asked.value.attr == "capabilities":
        return capabilities[asked.attr]
    return getattr(driver, asked.attr)


# --- classes --------------------------------------------------------------------------------------


@cache
def _contracts() -> Mapping[str, ast.ClassDef]:
    """The classes of the kit."""
    trees = [ast.parse(path.read_text()) for path in sorted(CONTRACTS.glob("*.py"))]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def _fixtures() -> frozenset[str]:
    """What a driver's tests may give the kit beside its factory: fixtures that are None by default."""
    return frozenset(
        node.name
        for cls in _contracts().values()
        for node in cls.body
        if isinstance(node, Function) and isinstance(node.body[-1], ast.Return)
        if isinstance(node.body[-1].value, ast.Constant) and node.body[-1].value.value is None
    )


def _family(cls: ast.ClassDef, known: Mapping[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """A class after those it is made of, each once."""
    seen: dict[str, ast.ClassDef] = {}

    def visit(each: ast.ClassDef) -> None:
        for base in _bases(each):
            if base in known and base not in seen:
                visit(known[base])
        seen.setdefault(each.name, each)

    visit(cls)
    yield from seen.values()


def _bases(cls: ast.ClassDef) -> Sequence[str]:
    return [ast.unparse(base).rpartition(".")[2] for base in cls.bases]

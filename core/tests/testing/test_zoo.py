"""The kit is tested itself: each wrong driver fails exactly the laws that name its fault, and the honest ones none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

from umbel.testing import contracts

from .zoo import (
    compressor,
    pool,
    result_store,
    scheduler,
    serializer,
    transport_delivery,
    transport_flow,
    transport_session,
)
from .zoo.house import FULL, House, name

HOUSES: Sequence[House] = [
    pool.HOUSE,  # the slowest first
    transport_session.HOUSE,
    transport_delivery.HOUSE,
    transport_flow.HOUSE,
    result_store.HOUSE,
    serializer.HOUSE,
    compressor.HOUSE,
    scheduler.HOUSE,
]
ANIMALS = [(house, driver) for house in HOUSES for driver in house.broken]
VISIT = 40
"""Animals that one process looks after."""
KEEPERS = 3
"""Processes at once: laws mostly wait."""

UNBROKEN: Mapping[str, str] = {}
"""Laws that no driver could be written to break, each with the reason why it is a law all the same."""


# --- no law without an animal ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", contracts.__all__)
def test_every_law_is_broken_by_an_animal(kind: str) -> None:
    contract = getattr(contracts, kind)
    laws = {law for law in dir(contract) if law.startswith("test_")}
    broken = {
        law.partition("[")[0]
        for house in HOUSES
        if issubclass(house.cage, contract)
        for animal in house.broken.values()
        for law in animal
    }
    assert broken <= laws, "animals name laws that are not there"
    assert laws - broken == {law for law in UNBROKEN if law in laws}


def test_every_law_without_an_animal_has_its_reason() -> None:
    assert all(UNBROKEN.values())
    assert all(any(hasattr(getattr(contracts, kind), law) for kind in contracts.__all__) for law in UNBROKEN)


# --- every animal breaks its laws -----------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, bool]]:
    """By test class: every law, and whether it was broken."""
    folder = tmp_path_factory.mktemp("zoo")
    found: dict[str, dict[str, bool]] = {}

    def visit(tests: Sequence[str], report: Path) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=native", "--assert=plain"]
        command += [f"--junitxml={report}", *tests]
        # What is to fail here is not to be told at length, as pytest and hypothesis do where CI is set. Nor is code to
        # be parsed for it, which pytest's own tracebacks and the carets of Python's do: a collection amid the parsing
        # can finish a task that an animal left behind, whose logged traceback parses too, and on Python 3.11 that
        # ends pytest with "AST constructor recursion depth mismatch" (CPython issue 106905).
        environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
        environment |= {"PYTHONNODEBUGRANGES": "1", "UMBEL_TEST_FULL": str(int(FULL))}
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=840,
            check=False,
        )
        assert done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), done.stdout
        for case in ElementTree.parse(report).iter("testcase"):
            assert "classname" in case.attrib, done.stdout  # an error of no test's own
            broken = case.find("failure") is not None or case.find("error") is not None
            found.setdefault(case.attrib["classname"].rpartition(".")[2], {})[case.attrib["name"]] = broken

    with ThreadPoolExecutor(KEEPERS) as keepers:
        visits = []
        for house in HOUSES:
            tests = [f"{house.file}::{name(driver)}" for driver in house.broken]
            visits += [tests[at : at + VISIT] for at in range(0, len(tests), VISIT)]
        for done in [keepers.submit(visit, tests, folder / f"{n}.xml") for n, tests in enumerate(visits)]:
            done.result()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # a starved machine takes several times as long; each law has its own limit
@pytest.mark.parametrize(("house", "driver"), ANIMALS, ids=[driver.__name__ for _, driver in ANIMALS])
def test_an_animal_breaks_the_laws_that_name_its_fault_and_no_others(
    house: House, driver: type, ends: Mapping[str, Mapping[str, bool]]
) -> None:
    named = house.broken[driver]
    cases = ends[name(driver)]
    assert {case for case, broken in cases.items() if broken} == {
        case for case in cases if case in named or case.partition("[")[0] in named
    }
    assert all(law in cases or any(case.startswith(f"{law}[") for case in cases) for law in named)

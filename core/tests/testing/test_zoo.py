"""The kit is tested itself: each wrong driver fails exactly the laws that name its fault, and the honest ones none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .zoo import BREAKS, CAGES

ZOO = Path(__file__).with_name("zoo.py")
VISIT = 17
"""Animals that one process looks after."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def visits() -> Iterator[list[str]]:
    for kind in CAGES:
        names = iter([f"Test{driver.__name__}" for driver in BREAKS if issubclass(driver, kind)])
        while visit := list(islice(names, VISIT)):
            yield visit


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, set[str]]:
    """The laws that each animal broke. A few processes, all at once: laws mostly wait."""
    folder = tmp_path_factory.mktemp("zoo")
    found: dict[str, set[str]] = {}
    with ExitStack() as stack:

        def visit(names: Sequence[str], report: Path) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=native"]
            command += [f"--junitxml={report}", *(f"{ZOO}::{name}" for name in names)]
            # What is to fail here is not to be told at length, as pytest and hypothesis do where CI is set. Nor is code to
            # be parsed for it, which pytest's own tracebacks and the carets of Python's do: a collection amid the parsing
            # can finish a task that an animal left behind, whose logged traceback parses too, and on Python 3.11 that
            # ends pytest with "AST constructor recursion depth mismatch" (CPython issue 106905).
            environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
            environment["PYTHONNODEBUGRANGES"] = "1"
            process = stack.enter_context(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
            stack.callback(process.kill)
            return process

        running = [(names, folder / f"{n}.xml", visit(names, folder / f"{n}.xml")) for n, names in enumerate(visits())]
        for names, report, process in running:
            told, _ = process.communicate()
            assert process.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), told
            for case in ElementTree.parse(report).iter("testcase"):
                assert "classname" in case.attrib, told  # an error of no test's own
                broken = found.setdefault(case.attrib["classname"].rpartition(".")[2], set())
                if case.find("failure") is not None or case.find("error") is not None:
                    broken.add(case.attrib["name"])
    return found


@pytest.mark.parametrize("driver", BREAKS, ids=lambda driver: driver.__name__)
def test_an_animal_breaks_the_laws_that_name_its_fault_and_no_others(
    driver: type, failed: Mapping[str, set[str]]
) -> None:
    assert failed[f"Test{driver.__name__}"] == BREAKS[driver]

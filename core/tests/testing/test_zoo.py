"""The kit is tested itself: each wrong driver fails exactly the laws that name its fault, and the honest ones none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .zoo import BREAKS, CAGES

ZOO = Path(__file__).with_name("zoo.py")


def test_every_law_but_some_is_broken_by_an_animal() -> None:
    """A law that no animal breaks may be unable to fail."""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, set[str]]:
    """The laws that each animal broke. The cages of each port are visited by a process of its own, all at once."""
    folder = tmp_path_factory.mktemp("zoo")
    visits = []
    for kind in CAGES:
        names = [f"Test{driver.__name__}" for driver in BREAKS if issubclass(driver, kind)]
        report = folder / f"{kind.__name__}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
        command += [f"{ZOO}::{name}" for name in names]
        environment = {**os.environ, "PYTEST_ADDOPTS": ""}
        visits.append((report, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)))
    found: dict[str, set[str]] = {}
    for report, visit in visits:
        told, _ = visit.communicate(timeout=110)
        assert report.exists(), told
        for case in ElementTree.parse(report).iter("testcase"):
            broken = found.setdefault(case.attrib["classname"].rpartition(".")[2], set())
            if case.find("failure") is not None or case.find("error") is not None:
                broken.add(case.attrib["name"])
    return found


@pytest.mark.parametrize("driver", BREAKS, ids=lambda driver: driver.__name__)
def test_an_animal_breaks_the_laws_that_name_its_fault_and_no_others(
    driver: type, failed: Mapping[str, set[str]]
) -> None:
    assert failed[f"Test{driver.__name__}"] == BREAKS[driver]

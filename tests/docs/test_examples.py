"""Every example in the documentation does what its page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import click
import pytest

from umbel.cli.group import root
from umbel.settings.sources import load

sys.path.insert(0, str(Path(__file__).parent))
try:
    from blocks import Block, blocks, commands
finally:
    del sys.path[0]

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "core/README.md",
    *sorted(p for p in ROOT.glob("docs/**/*.md") if not {"_build", "_generated"} & set(p.parts)),
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of(*languages: str) -> list[object]:
    return [
        pytest.param(block, id=f"{named(page)}:{block.line}")
        for page in PAGES
        for block in blocks(page)
        if block.language in languages
    ]


def runs(page: Path) -> bool:
    return any(block.language in ("act", "python", "pycon") or block.note.startswith("run") for block in blocks(page))


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[Path, Future[subprocess.CompletedProcess[str]]]]:
    """What running each selected page came to; a few run at once, for most of their time is spent waiting."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = dict.fromkeys(cast("Path", spec.params["page"]) for spec in specs if spec and "page" in spec.params)
    with ThreadPoolExecutor(3) as threads:
        yield {page: threads.submit(run, page, tmp_path_factory.mktemp("page")) for page in chosen}


def run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    runner = Path(__file__).with_name("run_page.py")
    return subprocess.run(
        [sys.executable, "-W", "error", runner, page],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("UMBEL_", "PYTEST_"))},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=named)
def test_the_examples_of_a_page_run(
    page: Path, outcomes: Mapping[Path, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = outcomes[page].result()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", of("toml"))
def test_settings_files_load(block: Block, tmp_path: Path) -> None:
    if block.note == "not settings":
        tomllib.loads(block.text)
        return
    name = block.note.removeprefix("file: ") if block.note.startswith("file: ") else "umbel.toml"
    (tmp_path / name).write_text(block.text)
    assert load(start=tmp_path, environ={}).file == tmp_path / name


def umbel_calls(block: Block) -> list[list[str]]:
    """The words after ``umbel`` in every line that calls it, settings in the environment checked on the way."""
    if block.language == "console":
        lines = [command for command, _ in commands(block.text)]
    elif block.language == "ini":
        lines = re.findall(r"^Exec\w+=(.*)$", block.text, re.MULTILINE)
    else:
        lines = [
            " ".join(re.findall(r'"([^"]*)"', line)) for line in re.findall(r"(?:command|args): *\[(.*)\]", block.text)
        ]
    calls = []
    for line in lines:
        words = shlex.split(re.split(r" [|>&]", line)[0], comments=True)
        given = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, given[name] = words.pop(0).partition("=")
        if "exits with" not in block.note:
            load(start="/", environ={n: v for n, v in given.items() if n.startswith("UMBEL_")})
        if words and Path(words[0]).name == "umbel":
            calls.append(words[1:])
    return calls


def parse(words: list[str]) -> None:
    """Parse a call as ``umbel`` would, options of its commands included, and run nothing."""
    if words[-1:] in (["--help"], ["-h"]):
        words = words[:-1]
    context = root.make_context("umbel", list(words))
    command: click.Command = root
    while isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("block", of("console", "ini", "yaml"))
def test_commands_parse(block: Block) -> None:
    for words in umbel_calls(block):
        parse(words)


@pytest.mark.parametrize("words", ["wrker", "worker --no-such-option", "call", "config shw"])
def test_a_wrong_command_would_be_found(words: str) -> None:
    with pytest.raises(click.UsageError):
        parse(words.split())


def test_no_example_is_in_a_language_that_nobody_checks() -> None:
    checked = {"act", "python", "pycon", "toml", "console", "ini", "yaml"}
    shown = {"text", "mermaid", "json", "{toctree}", "{include}", "{note}"}
    others = [(page, b) for page in PAGES for b in blocks(page) if b.language not in checked | shown]
    assert not [f"{named(page)}:{block.line}: {block.language or 'no language'}" for page, block in others]


def test_every_link_inside_the_repository_leads_somewhere() -> None:
    link = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
    fence = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    targets = [(page, target) for page in PAGES for target in link.findall(fence.sub("", page.read_text()))]
    assert not [f"{named(page)}: {target}" for page, target in targets if not (page.parent / target).exists()]

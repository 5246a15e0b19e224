"""What no text of the repository may say, and what every exception from a rule must say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A letter in brackets matches itself, and keeps this file from being found.
FORBIDDEN = {
    "an absolute path of one machine": re.compile(r"(?<![\w.})>*-])/(?:[w]ork|[r]oot|[h]ome|[U]sers)/\w"),
    "the host of a package index": re.compile(
        r"[p]ypi\.org|[p]ythonhosted|[n]pmjs|[c]rates\.io|[p]roxy\.golang|[r]epo1?\.maven|[d]eb\.debian|[d]ocker\.io"
    ),
    "talk of a workplace": re.compile(
        r"\b(?:this|my|your|in an? (?:earlier|previous|later)|in the (?:last|next)) [s]ession\b"
        r"|\b(?:this|my|your|the|system|user) [p]rompt\b"
        r"|\b(?:[s]ub|coding )-?agents?\b|\b[l]anguage models?\b|\bAI [a]ssistant",
        re.IGNORECASE,
    ),
}

IGNORE = re.compile(r"#\s*(?:type:\s*ignore|(?:ruff:\s*)?noqa|pragma:\s*no cover|pyright:\s*ignore)\b(?P<rest>.*)")
REASONED = re.compile(r"^(?:\[[\w, -]+\]|:\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*)\s+#\s*\w.*")
"""First what exactly is ignored, then a comment that says why."""


@cache
def texts() -> dict[Path, list[str]]:
    """The lines of every file that git tracks, or would: what is ignored is nobody's text."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {}
    for name in sorted(filter(None, listed.split("\0"))):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            found[Path(name)] = data.decode().splitlines()
    return found


def lines(*suffixes: str) -> Iterator[tuple[str, str]]:
    for path, content in texts().items():
        if not suffixes or path.suffix in suffixes:
            yield from ((f"{path}:{number}", line) for number, line in enumerate(content, 1))


def test_no_text_names_a_machine_an_index_or_a_workplace() -> None:
    found = [
        f"{where}: {what}: {m[0]!r}"
        for where, line in lines()
        for what, p in FORBIDDEN.items()
        if (m := p.search(line))
    ]
    assert not found, "\n".join(found)


def test_the_patterns_know_what_they_look_for() -> None:
    path, index, workplace = FORBIDDEN.values()
    assert path.search("see {}work/main/x".format("/"))
    assert path.search('open("{}home/me/x")'.format("/"))
    assert not path.search("https://example.org/work/1")
    assert index.search("https://files.{}hosted.org/".format("python"))
    assert workplace.search("as said in an earlier {}".format("session"))
    assert not workplace.search("a broker session is thrown away whole")


def test_every_ignored_finding_has_its_reason_beside_it() -> None:
    bare = [
        f"{where}: {line.strip()}"
        for where, line in lines(".py")
        if (m := IGNORE.search(line)) and not REASONED.match(m["rest"])
    ]
    assert not bare, "name what is ignored, and say why:\n" + "\n".join(bare)


def test_every_ignored_rule_has_its_reason_beside_it() -> None:
    bare, inside = [], False
    for where, line in lines(".toml"):
        if inside and re.search(r'"[A-Z]+\d+"', line) and "#" not in line:
            bare.append(f"{where}: {line.strip()}")
        opened = re.match(r'\s*(?:(?:extend-)?ignore|".*"|disable_error_code)\s*=\s*\[', line)
        inside = (inside or opened is not None) and "]" not in line
        if opened and "]" in line and "#" not in line and "ignore" in line:
            bare.append(f"{where}: {line.strip()}")
    assert not bare, "\n".join(bare)


def test_a_reason_is_told_from_none() -> None:
    assert REASONED.match("[override]  # the one difference")
    assert REASONED.match(": RUF009  # setting() makes an attrs field")
    assert not REASONED.match("[override]")
    assert not REASONED.match(": E501")
    assert not REASONED.match("  # because")

"""What is wrong before a worker has started: one clear sentence for each problem, no traceback, nothing half started."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster


def refusal(cluster: Cluster, *arguments: str, env: dict[str, str] | None = None) -> str:
    """The one sentence with which ``umbel worker`` refuses to start."""
    done = cluster.run("-m", "umbel", "worker", *arguments, env=env)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if "Error" in line or "CRITICAL" in line]
    assert len(told) == 1, done.stderr
    assert cluster.stragglers() == []
    return told[0]


def install(cluster: Cluster, distribution: str, group: str, name: str, code: str) -> None:
    """A distribution in the cluster's folder, on the path of its processes, that offers one plugin."""
    module = distribution.replace("-", "_")
    (cluster.folder / f"{module}.py").write_text(textwrap.dedent(code))
    info = cluster.folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:Plugin\n")


HIDE_SOLO = """
import importlib.metadata as metadata

found = metadata.Distribution.discover
metadata.Distribution.discover = classmethod(
    lambda cls, **context: (d for d in found(**context) if d.metadata["Name"] != "umbel-solo")
)
"""

# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"worker__pool": "prefrok"}, ["[worker] pool", "'prefrok'", "did you mean 'prefork'"]),
        ({"broker__url": "sqlit:///x"}, ["[broker] url", "'sqlit'", "did you mean 'sqlite'"]),
        ({"codec__serializer": "jsn", "codec__accept": ["jsn"]}, ["'jsn'", "did you mean 'json'"]),
        ({"broker__url": "kafka-of-the-future://x"}, ["[broker] url", "'kafka-of-the-future'"]),
        ({"worker__concurency": 2}, ["umbel.toml", "worker.concurency", "concurrency"]),
        ({"wroker__concurrency": 2}, ["umbel.toml", "wroker", "worker"]),
        ({"worker__concurrency": "many"}, ["umbel.toml", "worker.concurrency", "whole number"]),
        ({"worker__queues": "default"}, ["umbel.toml", "worker.queues", "list"]),
        ({"broker__lease": "soon"}, ["umbel.toml", "broker.lease", "duration"]),
        ({"broker__options__busy_timout": 3}, ["busy_timout", "busy_timeout"]),
        ({"broker__url": "sqlite://two/slashes"}, ["sqlite:///"]),
        ({"codec__serializer": "pickle"}, ["[codec] serializer", "pickle", "accept"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_told_in_one_sentence_with_its_remedy(
    cluster: Cluster, settings: dict[str, Any], fragments: list[str]
) -> None:
    cluster.configure(**settings)
    told = refusal(cluster)
    for fragment in fragments:
        assert fragment in told


def test_a_plugin_of_ours_that_is_not_installed_is_offered_with_its_pip_line(cluster: Cluster) -> None:
    (cluster.folder / "sitecustomize.py").write_text(HIDE_SOLO)
    cluster.configure(worker__pool="solo", worker__concurrency=1)
    python_path = f"{cluster.folder}{os.pathsep}{cluster.env['PYTHONPATH']}"
    told = refusal(cluster, env={"PYTHONPATH": python_path})
    assert "'solo'" in told
    assert 'pip install "umbel[solo]"' in told


def test_every_problem_is_told_at_once(cluster: Cluster) -> None:
    cluster.configure(worker__concurency=2, broker__lease="soon", results__expires=[])
    done = cluster.umbel("worker")
    told = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert done.returncode == 2
    assert len(told) == 3
    assert all(str(cluster.folder / "umbel.toml") in line for line in told)


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("gone.toml", None, "gone.toml"),
        ("broken.toml", b"[worker\nconcurrency = 2", "broken.toml"),
        ("bytes.toml", b"\xff\xfe\x00", "bytes.toml"),
        ("folder.toml", "folder", "folder.toml"),
    ],
)
def test_a_settings_file_that_cannot_be_read_is_named(
    cluster: Cluster, name: str, content: bytes | str | None, fragment: str
) -> None:
    file: Path = cluster.folder / name
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    assert fragment in refusal(cluster, "--config", str(file))


# --- plugins ------------------------------------------------------------------------------------

POOL = "umbel.pools"
GOOD = """
    from umbel.ports.pool import Pool
    from umbel_threads.pool import ThreadsPool

    class Plugin(ThreadsPool):
        pass
"""


def test_two_distributions_that_offer_one_name_are_both_named(cluster: Cluster) -> None:
    install(cluster, "rival-one", POOL, "rival", GOOD)
    install(cluster, "rival-two", POOL, "rival", GOOD)
    cluster.configure(worker__pool="rival")
    told = refusal(cluster)
    assert "rival-one" in told
    assert "rival-two" in told


@pytest.mark.parametrize(
    ("code", "fragments"),
    [
        ("raise RuntimeError('half written')", ["odd-pool", "half written"]),
        ("import a_library_that_is_not_here", ["odd-pool", "a_library_that_is_not_here"]),
        ("class Plugin: pass", ["odd-pool", "Pool"]),
        ("x = 1", ["odd-pool", "Plugin"]),
        (GOOD + "\n        api_version = (99, 0)\n", ["odd-pool", "99.0", "1.0"]),
        (GOOD + "\n        def __init__(self, *, options=None):\n            raise OSError('no room')\n", ["no room"]),
    ],
    ids=["raises", "library missing", "no pool", "nothing there", "other api", "raises when made"],
)
def test_a_plugin_that_cannot_be_used_is_told_with_its_distribution(
    cluster: Cluster, code: str, fragments: list[str]
) -> None:
    install(cluster, "odd-pool", POOL, "odd", code)
    cluster.configure(worker__pool="odd")
    told = refusal(cluster)
    for fragment in fragments:
        assert fragment in told


def test_a_plugin_that_nobody_names_is_not_even_imported(cluster: Cluster) -> None:
    install(cluster, "odd-pool", POOL, "odd", "raise SystemExit('imported')")
    worker = cluster.worker()
    assert cluster.send("add", 1, 1).get(timeout=30) == 2
    assert worker.end() == 0


# --- the application ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "fragments"),
    [
        (None, ["no module 'broken'"]),
        ("1 / 0", ["'broken'", "ZeroDivisionError"]),
        ("import not_installed_at_all", ["'broken'", "'not_installed_at_all'", "not installed"]),
        ("def f(:", ["'broken'", "SyntaxError"]),
        ("x = 1", ["'broken'", "no Umbel app"]),
    ],
    ids=["missing", "raises", "library missing", "syntax", "no app"],
)
def test_an_app_that_cannot_be_imported_is_told_with_the_reason(
    cluster: Cluster, code: str | None, fragments: list[str]
) -> None:
    if code is not None:
        (cluster.folder / "broken.py").write_text(code)
    told = refusal(cluster, "-A", "broken")
    for fragment in fragments:
        assert fragment in told


def test_an_app_that_cannot_be_imported_by_a_child_is_told_with_the_reason(cluster: Cluster) -> None:
    """The fork server imports it anew: what goes wrong only there stops the worker too."""
    (cluster.folder / "onlyhere.py").write_text(
        "import os\nfrom umbel import Umbel\n"
        "assert not os.environ.get('SEEN'), 'once is enough'\n"
        "os.environ['SEEN'] = '1'\n"
        "app = Umbel('onlyhere')\n"
    )
    done = cluster.umbel("-A", "onlyhere", "worker")
    assert done.returncode == 1
    assert "once is enough" in done.stderr
    assert cluster.stragglers() == []


# --- the files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["broker", "results"])
@pytest.mark.parametrize("obstacle", ["a directory", "no directory", "not a database"])
def test_a_file_that_cannot_be_used_is_named(cluster: Cluster, which: str, obstacle: str) -> None:
    file = cluster.folder / "obstacle"
    if obstacle == "a directory":
        file.mkdir()
    elif obstacle == "no directory":
        file = file / "deeper" / "file"
    else:
        file.write_bytes(b"This is not a database, and long enough to tell. " * 10)
    cluster.configure(**{f"{which}__url": f"sqlite:///{file}"})
    if which == "broker":
        assert str(file) in refusal(cluster)
        done = cluster.umbel("call", "shop.add", "1", "2")
    else:
        done = cluster.umbel("result", "some-id")
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr

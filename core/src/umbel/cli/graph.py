"""``umbel worker --graph``: the worker's steps, what each requires, whose they are, and the order of their start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen

from umbel.cli.output import clean, count
from umbel.plugins.kinds import HOOK
from umbel.plugins.loader import source_of_class
from umbel.worker.steps import earlier_steps

if TYPE_CHECKING:
    from umbel.worker.worker import Worker


@frozen(kw_only=True)
class Node:
    """One step."""

    name: str
    requires: Sequence[str]
    """What it asks for itself."""
    after: Sequence[str]
    """All that must have started before it, also because those say so; the one that starts last comes last."""
    plugin: str | None
    """The plugin that contributes it; None: it is the worker's own."""
    distribution: str | None
    """None: of the application."""
    version: str | None
    object: str
    """``module:class``."""

    @property
    def origin(self) -> str:
        """Whose it is, for people."""
        if self.distribution is not None:
            return f"{self.distribution} {self.version}"
        return self.object.partition(":")[0]


def nodes(worker: Worker) -> list[Node]:
    """The steps of a worker in the order in which they start. Makes them; nothing is connected."""
    worker.make_steps()
    earlier = earlier_steps(worker.steps)
    position = {step.name: number for number, step in enumerate(worker.steps)}
    found = []
    for step in worker.steps:
        cls = type(step)
        plugin = worker.added_by.get(step.name)
        source = source_of_class(HOOK, cls)
        own = plugin is None
        found.append(
            Node(
                name=step.name,
                requires=list(step.requires),
                after=sorted(earlier[step.name], key=position.__getitem__),
                plugin=plugin,
                distribution="umbel-core" if own else source.distribution,
                version=version("umbel-core") if own else source.version,
                object=f"{cls.__module__}:{cls.__qualname__}",
            )
        )
    return found


def document(worker: Worker, steps: Sequence[Node]) -> Mapping[str, Any]:
    """What ``--json`` prints: the steps in the order of their start."""
    return {"worker": worker.name, "steps": [asdict(node) for node in steps]}


def mermaid(steps: Sequence[Node]) -> str:
    """A flow chart: an arrow leads from a step to those that start after it."""
    names = {node.name: f"s{number}" for number, node in enumerate(steps, 1)}
    lines = ["flowchart TD"]
    for number, node in enumerate(steps, 1):
        label = clean(f"{number} {node.name}").replace('"', "#quot;")
        lines.append(f'  {names[node.name]}["{label}<br>{clean(node.origin)}"]')
    lines += [f"  {names[before]} --> {names[node.name]}" for node in steps for before in node.after]
    return "\n".join(lines)


def tree(steps: Sequence[Node]) -> str:
    """Each step below the last of those that it waits for, with its place in the order of the start."""
    below: dict[str | None, list[Node]] = {}
    for node in steps:
        below.setdefault(node.after[-1] if node.after else None, []).append(node)
    number = {node.name: place for place, node in enumerate(steps, 1)}
    rows: list[tuple[str, str, str]] = []

    def draw(node: Node, indent: str, branch: str, inner: str) -> None:
        also = ", ".join(clean(name) for name in node.after[:-1])
        rows.append(
            (
                f"{number[node.name]:>3}  {indent}{branch}{clean(node.name)}",
                clean(node.origin),
                f"also after {also}" if also else "",
            )
        )
        children = below.get(node.name, [])
        for child in children:
            last = child is children[-1]
            draw(child, indent + inner, "└─ " if last else "├─ ", "   " if last else "│  ")

    for root in below.get(None, []):
        draw(root, "", "", "")
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    head = f"{count(len(steps), 'step')}, started in the order of their numbers and stopped in reverse:"
    return "\n".join(
        [head, *(f"{left:{widths[0]}}  {origin:{widths[1]}}  {also}".rstrip() for left, origin, also in rows)]
    )

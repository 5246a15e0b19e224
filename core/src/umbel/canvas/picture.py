"""A workflow as it stands: what is stored of it, as lines for a terminal, as Mermaid, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from umbel.canvas.graph import PREFIX, Shown
from umbel.canvas.sending import read_shown, shown_of
from umbel.model import FINAL_STATES, State

if TYPE_CHECKING:
    from umbel.app import Umbel

_SIGNS: Final[Mapping[str, str]] = {
    "SUCCESS": "✓",
    "FAILURE": "✗",
    "REVOKED": "⊘",
    "RETRY": "↻",
    "STARTED": "▶",
    "WAITING": "·",
}
_AT_ONCE: Final = 500


@frozen
class Standing:
    """A workflow and the states of its tasks at one moment."""

    id: str
    state: str
    """RUNNING, or how it has ended."""
    shown: Shown
    joins: tuple[str, ...]
    states: Mapping[str, str]
    """By task id; a task without a record waits, runs, or was never sent."""

    def state_of(self, task_id: str) -> str:
        return self.states.get(task_id, "WAITING")

    def lines(self) -> list[str]:
        """A tree, a line for each task and group."""
        done = sum(1 for state in self.states.values() if state in FINAL_STATES)
        return [f"{self.id}  {self.state}  {done} tasks have ended", *_lines(self.shown, self)]

    def to_plain(self) -> dict[str, Any]:
        return {"id": self.id, "state": self.state, "steps": [_plain(one, self) for one in self.shown.line()]}

    def mermaid(self) -> str:
        """A flow chart, for whatever draws Mermaid."""
        lines = ["flowchart TD"]
        _mermaid(self.shown, self, lines, [0])
        lines += [f"  classDef {name} {style}" for name, style in _STYLES.items()]
        return "\n".join(lines)


def standing(app: Umbel, workflow: str) -> Standing | None:
    """How a workflow stands now; None where nothing is stored of it. Blocks. Raises ``ResultStoreUnavailable``."""
    record = shown_of(app, workflow)
    if record is None:
        return None
    shown, joins = read_shown(app, record)
    states: dict[str, str] = {}
    ids = (task_id for one in shown.every() for task_id in ([] if one.members is not None else one.ids()))
    while part := list(islice(ids, _AT_ONCE)):
        states |= {task_id: found.state for task_id, found in app.gateway.get(part).items()}
    state = record.state if record.final else "RUNNING"
    return Standing(workflow, state, shown, tuple(joins), states)


def listed(app: Umbel) -> list[tuple[float, str, str]]:
    """When each workflow that is stored was sent, its id, and the names of its tasks; the newest first.

    Raises ``NotSupported`` where the result store keeps no claims, ``ResultStoreUnavailable``.
    """
    found = []
    for plain in app.gateway.ask("claims", PREFIX):
        sent, _, names = bytes(plain["value"]).decode(errors="replace").partition(" ")
        found.append((float(sent), str(plain["name"]).removeprefix(PREFIX), names))
    return sorted(found, reverse=True)


def _lines(shown: Shown, standing: Standing, indent: str = "") -> Iterator[str]:
    for one in shown.line():
        if one.count is not None:
            counts = Counter(standing.state_of(task_id) for task_id in one.ids())
            told = ", ".join(f"{number} {state}" for state, number in counts.most_common())
            yield f"{indent}∥ group of {one.count} {one.task}: {told}"
        elif one.members is not None:
            yield f"{indent}∥ group of {len(one.members)}"
            for member in one.members:
                yield from _lines(member, standing, indent + "  ")
        else:
            state = standing.state_of(one.id)
            yield f"{indent}{_SIGNS.get(state, '?')} {one.task}  {state}  {one.id}"


def _plain(one: Shown, standing: Standing) -> dict[str, Any]:
    if one.count is not None:
        counts = Counter(standing.state_of(task_id) for task_id in one.ids())
        return {"group": one.id, "task": one.task, "count": one.count, "states": dict(counts)}
    if one.members is not None:
        members = [[_plain(step, standing) for step in member.line()] for member in one.members]
        return {"group": one.id, "members": members}
    return {"task": one.task, "id": one.id, "state": standing.state_of(one.id)}


_STYLES: Final[Mapping[str, str]] = {
    "success": "fill:#d4edda,stroke:#28a745",
    "failure": "fill:#f8d7da,stroke:#dc3545",
    "revoked": "fill:#e2e3e5,stroke:#6c757d",
    "waiting": "fill:#ffffff,stroke:#6c757d",
}


def _mermaid(shown: Shown, standing: Standing, lines: list[str], numbers: list[int]) -> tuple[list[str], list[str]]:
    """Draw it; the names of the nodes that it begins and ends with."""
    begin: list[str] = []
    last: list[str] = []
    for one in shown.line():
        first, end = _node(one, standing, lines, numbers)
        begin = begin or first
        lines += [f"  {a} --> {b}" for a in last for b in first]
        last = end
    return begin, last


def _node(one: Shown, standing: Standing, lines: list[str], numbers: list[int]) -> tuple[list[str], list[str]]:
    if one.members:
        ends = [_mermaid(member, standing, lines, numbers) for member in one.members]
        return [name for first, _ in ends for name in first], [name for _, last in ends for name in last]
    numbers[0] += 1
    name = f"n{numbers[0]}"
    label, states = one.task or "nothing", [standing.state_of(task_id) for task_id in one.ids()]
    if one.is_group:
        label = f"{one.count or 0} of {label}"
    state = next((s for s in ("FAILURE", "REVOKED") if s in states), State.SUCCESS.value)
    if state == State.SUCCESS and any(each != State.SUCCESS for each in states):
        state = "WAITING"
    lines.append(f"  {name}[{_quoted(label)}]:::{state.lower()}")
    return [name], [name]


def _quoted(text: str) -> str:
    return '"' + "".join(c if c.isprintable() else "?" for c in text).replace('"', "'") + '"'

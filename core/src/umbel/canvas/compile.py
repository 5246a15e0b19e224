"""From a composed call to what is stored and sent. Pure: ids come from the workflow's id, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from attrs import evolve

from umbel.canvas.compose import ACCUMULATE, Chain, Chord, Group
from umbel.canvas.graph import (
    CANCELS,
    ENOUGH,
    LISTED,
    NODE,
    TOGETHER,
    WORKFLOW,
    Branch,
    Join,
    Plan,
    Shown,
    Slot,
    derived,
)
from umbel.canvas.signature import Canvas, Signature, plain_signatures

_OF_COMPOSED: Final = frozenset({"on_error", "link", "link_error", "task_id", "group_id", "countdown", "eta", "chain"})
"""Options of a composed call that are not simply those of each of its tasks."""


def compiled(
    canvas: Canvas[Any], workflow: str, options: Mapping[str, Any] | None = None, *, ends: bool = True
) -> Plan:
    """Compile ``canvas`` as the workflow of that id. ``options`` are those of the sending.

    ``ends`` False: it is a part of another workflow, whose slot its last task carries in its headers.
    """
    return _Compiler(workflow).plan(canvas.set(**options) if options else canvas, ends)


def joins(canvas: Canvas[Any], *, last: bool = True) -> bool:
    """Whether something in ``canvas`` has to be waited for, other than a task by the next. ``last``: nothing follows it."""
    match canvas:
        case Chain(tasks=tasks):
            if canvas.options.get("on_error") and any(not isinstance(task, Signature) for task in tasks):
                return True
            return any(joins(task, last=last and at == len(tasks)) for at, task in enumerate(tasks, 1))
        case Group():
            mine = not last or canvas.need != "all" or canvas.cancel or bool(canvas.options.get("on_error"))
            return mine or (not canvas.streamed and any(joins(member) for member in canvas.members))
        case Chord():
            return True
    return False


class _Compiler:
    def __init__(self, workflow: str) -> None:
        self._workflow = workflow
        self._ids = 0
        self._plan = Plan(workflow=workflow, shown=Shown(id=workflow), heads=iter(()))
        self._fresh: list[Join] = self._plan.joins
        self._first = True

    def plan(self, canvas: Canvas[Any], ends: bool) -> Plan:
        plan = self._plan
        end = None
        plan.stored = joins(canvas)
        if plan.stored and ends:
            end = Slot(self._join(listed=False, last=True).id)
        starts, plan.shown = self._place(canvas, end, {})
        plan.heads = iter(starts)
        return plan

    def _new_id(self) -> str:
        self._ids += 1
        return derived(self._workflow, self._ids)

    def _join(self, *, cancel: bool = False, **how: Any) -> Join:
        need = how.get("need", "all")
        early = f"{ENOUGH}{need}" if isinstance(need, int) else ""
        made = Join(id=f"{len(self._plan.names)}{early}{CANCELS if cancel else ''}", **how)
        self._plan.names.append(made.id)
        self._fresh.append(made)
        return made

    # --- placing: what has to be started so that a call runs and its end is marked in `end` ---------

    def _place(
        self, canvas: Canvas[Any], end: Slot | None, options: Mapping[str, Any], *, first: bool = True
    ) -> tuple[Sequence[Branch] | Iterator[Branch], Shown]:
        """``options``: those that composed calls around it give to each task. ``first``: it is sent at once."""
        if isinstance(canvas, Signature):
            return self._place_task(canvas, end, options)
        own = {**options, **{name: value for name, value in canvas.options.items() if name not in _OF_COMPOSED}}
        if isinstance(canvas, Chord):
            assert canvas.body is not None
            special = {name: canvas.options[name] for name in _OF_COMPOSED & canvas.options.keys()}
            for name in ("link", "link_error", "task_id", "chain"):  # of a chord, the body's
                if name in special:
                    canvas = evolve(canvas, body=_with(canvas.body, name, special[name]))
            start: dict[str, Any] = {name: special[name] for name in ("countdown", "eta") if name in special}
            barrier = {"on_error": special["on_error"]} if "on_error" in special else {}
            assert canvas.body is not None
            canvas = Chain(tasks=(canvas.header, canvas.body), options={**start, **barrier})
        if isinstance(canvas, Chain):
            return self._place_chain(canvas, end, own, first=first)
        assert isinstance(canvas, Group)
        return self._place_group(canvas, end, own, first=first)

    def _place_task(self, call: Signature, end: Slot | None, options: Mapping[str, Any]) -> tuple[list[Branch], Shown]:
        known = call.options.get("task_id")
        task_id = str(known) if known else self._new_id()
        mine = {**options, **call.options, "task_id": task_id}
        mine.pop("chord", None)  # of a canvas that a peer has frozen: who starts it says anew what it belongs to
        if end is not None:
            headers = {**(mine.get("headers") or {}), WORKFLOW: self._workflow, NODE: str(end)}
            if end.join.endswith(CANCELS):
                headers[TOGETHER] = f"{self._workflow}/{end.join}"
            mine |= {"headers": headers, "ignore_result": False}
        made = evolve(call, options=mine)
        return [Branch((made,), end)], Shown(id=task_id, task=call.task, slot="" if end is None else str(end))

    def _place_chain(
        self, canvas: Chain, end: Slot | None, options: Mapping[str, Any], *, first: bool
    ) -> tuple[Sequence[Branch] | Iterator[Branch], Shown]:
        steps = [*_unchained(canvas)] or [_nothing()]
        special = canvas.options
        plain = all(isinstance(step, Signature) for step in steps)
        if handlers := plain_signatures(special.get("on_error")):
            if plain:
                steps = [step.link_error(*handlers) for step in steps]
            else:
                end = self._barrier(end, handlers)
        if handlers := plain_signatures(special.get("link_error")):
            steps = [step.link_error(*handlers) for step in steps]
        for name in ("link", "task_id", "chain"):
            if name in special:
                steps[-1] = _with(steps[-1], name, special[name])
        for name in ("countdown", "eta"):
            if name in special:
                steps[0] = steps[0].set(**{name: special[name]})
        return self._place_steps(steps, end, options, first=first)

    def _place_steps(
        self, steps: Sequence[Canvas[Any]], end: Slot | None, options: Mapping[str, Any], *, first: bool
    ) -> tuple[Sequence[Branch] | Iterator[Branch], Shown]:
        """Ids are given front to back, as people read; what follows is known only back to front."""
        ends: list[Slot | None] = [None] * len(steps)
        ends[-1] = end
        gates: list[Join | None] = [None] * len(steps)
        for at in range(len(steps) - 2, -1, -1):
            step, following = steps[at], steps[at + 1]
            if isinstance(step, Signature) and (isinstance(following, Signature) or not self._plan.stored):
                ends[at] = ends[at + 1]
                continue
            gate: Join | None
            if isinstance(step, Group):
                handlers = plain_signatures(step.options.get("on_error"))
                gate = self._join(cancel=step.cancel, listed=True, size=None, need=step.need, errbacks=handlers)
            else:
                gate = self._join(listed=False)
            gates[at], ends[at] = gate, Slot(gate.id)
        before: Shown | None = None
        placed: list[Sequence[Branch] | Iterator[Branch]] = []
        for at, step in enumerate(steps):
            gate = gates[at]
            starts: Sequence[Branch] | Iterator[Branch]
            if isinstance(step, Group) and gate is not None:
                starts, shown = self._members(step, gate, options, first=first and at == 0)
            else:
                starts, shown = self._place(step, ends[at], options, first=first and at == 0)
            _first_of(shown).before = before
            before = shown
            placed.append(starts)
        for at in range(len(steps) - 1, 0, -1):
            gate = gates[at - 1]
            if gate is None:  # rides in the message of the one before it
                (one,) = placed[at - 1]
                rest = _riding([*placed[at]], isinstance(steps[at], Group))
                placed[at - 1] = [Branch((*one.steps, *rest.steps), rest.end)]
            else:
                gate.starts = [*placed[at]]
        assert before is not None
        return placed[0], before

    def _place_group(
        self, group: Group, end: Slot | None, options: Mapping[str, Any], *, first: bool
    ) -> tuple[Sequence[Branch] | Iterator[Branch], Shown]:
        """A group that nothing of its own chain follows: what is done with its value is known to ``end`` alone."""
        handlers = plain_signatures(group.options.get("on_error"))
        if end is None:
            return self._members(group, None, options, first=first)
        join = self._join(cancel=group.cancel, listed=True, size=None, need=group.need, to=end, errbacks=handlers)
        return self._members(group, join, options, first=first)

    def _members(
        self, group: Group, join: Join | None, options: Mapping[str, Any], *, first: bool
    ) -> tuple[Sequence[Branch] | Iterator[Branch], Shown]:
        own = {**options, **{n: v for n, v in group.options.items() if n not in _OF_COMPOSED}}
        given = {n: group.options[n] for n in ("countdown", "eta", "link", "link_error") if n in group.options}
        group_id = str(group.options.get("task_id") or group.options.get("group_id") or self._new_id())
        shown = Shown(id=group_id, slot="" if join is None else join.id)
        flat = self._flattened(group, group_id, join, {**own, "group_id": group_id}, given)
        if first and group.streamed and self._plan.open is None:
            shown.count, self._plan.open = 0, join
            return self._streamed(flat, shown, join), shown
        branches: list[Branch] = []
        shown.members = []
        for starts, member in flat:
            branches += starts
            shown.members.append(member)
        if not branches:  # its value is an empty list, which somebody has to hand on
            slot = None if join is None else Slot(join.id)
            if join is not None:
                join.listed = False
            starts, _ = self._place_task(_nothing(), slot, {})
            branches += starts
        if join is not None:
            join.size = max(len(shown.members), 1)
        if len(shown.members) > LISTED and all(
            not m.is_group and m.before is None and m.id == derived(group_id, at) for at, m in enumerate(shown.members)
        ):
            shown.task, shown.count, shown.members = shown.members[0].task, len(shown.members), None
        return branches, shown

    def _streamed(
        self, flat: Iterator[tuple[Sequence[Branch], Shown]], shown: Shown, join: Join | None
    ) -> Iterator[Branch]:
        """Each branch as its member is made; nothing of it is kept, unless its id is not the one that its place gives."""
        slot = 0
        for starts, member in flat:
            shown.task = shown.task or member.task
            usual = not member.is_group and member.before is None and member.id == derived(shown.id, slot)
            if not usual and shown.members is None:
                shown.members = [Shown(id=derived(shown.id, at), task=shown.task) for at in range(slot)]
                shown.count = None
            slot += 1
            if shown.members is not None:
                shown.members.append(member)
            else:
                shown.count = slot
            yield from starts
        if slot == 0:
            if join is not None:
                join.listed = False
            starts, _ = self._place_task(_nothing(), None if join is None else Slot(join.id), {})
            yield from starts
        if join is not None:
            join.size = max(slot, 1)

    def _flattened(
        self,
        group: Group,
        group_id: str,
        join: Join | None,
        options: Mapping[str, Any],
        given: Mapping[str, Any],
        at: list[int] | None = None,
    ) -> Iterator[tuple[Sequence[Branch], Shown]]:
        """The members, those of groups directly within among them: their results stand in one list."""
        at = at if at is not None else [0]
        for member in group.members:
            for name, value in given.items():
                member = _with(member, name, value)
            if (
                isinstance(member, Group)
                and member.need == "all"
                and not member.cancel
                and not member.options.get("on_error")
            ):
                within = {n: v for n, v in member.options.items() if n not in _OF_COMPOSED}
                theirs = {
                    n: member.options[n] for n in ("countdown", "eta", "link", "link_error") if n in member.options
                }
                yield from self._flattened(member, group_id, join, {**options, **within}, theirs, at)
                continue
            slot, at[0] = at[0], at[0] + 1
            yield self._member(member, group_id, slot, None if join is None else Slot(join.id, slot), options)

    def _member(
        self, member: Canvas[Any], group_id: str, index: int, end: Slot | None, options: Mapping[str, Any]
    ) -> tuple[Sequence[Branch], Shown]:
        place = {"group_id": group_id, "group_index": index}
        if isinstance(member, Signature):
            ids = {} if member.options.get("task_id") else {"task_id": derived(group_id, index)}
            starts, shown = self._place_task(member.set(**place, **ids), end, options)
            return starts, shown
        # Of a chain in a group, only the end belongs to the group.
        inner = {name: value for name, value in options.items() if name != "group_id"}
        if isinstance(member, Chain) and member.tasks and isinstance(member.tasks[-1], Signature):
            member = evolve(member, tasks=(*member.tasks[:-1], member.tasks[-1].set(**place)))
        if end is None and joins(member):  # its own workflow has an end, though the group that it is in has none
            end = Slot(self._join(listed=False).id)
            self._plan.stored = True
        found, shown = self._place(member, end, inner, first=False)
        return [*found], shown

    def _barrier(self, end: Slot | None, errbacks: Sequence[Mapping[str, Any]]) -> Slot:
        """A slot before ``end`` that tells of a failure once."""
        return Slot(self._join(listed=False, to=end, errbacks=errbacks).id)


def _riding(branches: Sequence[Branch], is_group: bool) -> Branch:
    """What follows a task in its message: the next task with what follows that, or a group that nothing waits for."""
    if not is_group:
        (one,) = branches
        return one
    members = [
        branch.steps[0].to_plain() if len(branch.steps) == 1 else Chain(tasks=branch.steps).to_plain()
        for branch in branches
    ]
    return Branch((Signature(task="celery.group", kwargs={"tasks": members}, subtask_type="group"),))


def _nothing() -> Signature:
    """A task whose value is an empty list."""
    return Signature(task=ACCUMULATE, immutable=True)


def _unchained(canvas: Chain) -> Iterator[Canvas[Any]]:
    """The steps of a chain; of chains and chords in it that have no options of their own, theirs."""
    for step in canvas.tasks:
        if isinstance(step, Chain) and not step.options:
            yield from _unchained(step)
        elif isinstance(step, Chord) and not step.options and step.body is not None:
            yield step.header
            yield from _unchained(Chain(tasks=(step.body,)))
        else:
            yield step


def _with(canvas: Canvas[Any], option: str, value: Any) -> Canvas[Any]:
    match option:
        case "link":
            return canvas.link(*plain_signatures(value))
        case "link_error":
            return canvas.link_error(*plain_signatures(value))
    return canvas if option in canvas.options else canvas.set(**{option: value})


def _first_of(shown: Shown) -> Shown:
    """The node that a chain shown as ``shown`` begins with."""
    while shown.before is not None:
        shown = shown.before
    return shown


def placed(canvas: Canvas[Any], workflow: str, end: Slot, task_id: str) -> Branch:
    """A task, or a chain of tasks, whose end is marked in ``end`` of a workflow that runs. Ids derive from ``task_id``."""
    steps = list(_unchained(canvas)) if isinstance(canvas, Chain) else [canvas]
    named = [
        step if step.options.get("task_id") else step.set(task_id=task_id if at == len(steps) else derived(task_id, at))
        for at, step in enumerate(steps, 1)
    ]
    (branch,), _ = _Compiler(workflow)._place_steps(named, end, {}, first=False)
    return branch

"""A running member of a group adds others: its place in the list becomes as many as they are, with its own result first.

What it adds is counted before its own end, for that end says how many there are. An attempt that is run again adds the same
again, under the same ids.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from umbel.canvas import joining
from umbel.canvas.compile import placed
from umbel.canvas.compose import Chain
from umbel.canvas.graph import NODE, WORKFLOW, Join, Slot, derived, join_key
from umbel.canvas.joining import Marked
from umbel.canvas.sending import branch_message, kept, plan_record
from umbel.canvas.signature import Canvas, Signature
from umbel.errors import NotSupported, UmbelError

if TYPE_CHECKING:
    from umbel.model import Message
    from umbel.task import Request

_grown: ContextVar[tuple[Request | None, int]] = ContextVar("umbel_grown", default=(None, 1))
"""The execution that has added members last, and the place of the next."""

VERB: Final = "workflow grow"
"""What a child asks of its worker: that the end of a task be marked where what it has added is."""


def added_by(request: Request, members: Sequence[Canvas[Any]]) -> list[Message]:
    """Make ``members`` part of the group that the task of ``request`` is a member of, and say so; what is to be sent. Blocks.

    Raises ``UmbelError`` where it is no member of a group that something waits for, ``NotSupported`` for members that are
    neither tasks nor chains of tasks, and in a task that others of its chain follow.
    """
    app, headers = request.task.app, request.message.headers
    if NODE not in headers:
        raise UmbelError(f"task {request.task.name} ({request.id}) is no member of a group that something waits for")
    if request.invocation.embed.chain:
        raise NotSupported("only the last task of a chain can add to the group that the chain is a member of")
    for member in members:
        steps = member.tasks if isinstance(member, Chain) else (member,)
        if not all(isinstance(step, Signature) for step in steps):
            raise NotSupported("what is added to a group while it runs is tasks, or chains of tasks")
    workflow, slot = str(headers[WORKFLOW]), Slot.read(headers[NODE])
    join = Join(id=name_of(slot), listed=True, size=None, to=slot, spread=True)
    known, first = _grown.get()
    first = first if known is request else 1
    join.size = first + len(members)
    app.gateway.ask(VERB, (request.id, join.id, join.size))
    _grown.set((request, join.size))
    app.gateway.put([plan_record(app, workflow, join)])
    joining.join(app.gateway, [Marked(join_key(workflow, join.id), {}, None, secrets.token_hex(8), kept(app))])
    found = []
    for number, member in enumerate(members, first):
        branch = placed(member, workflow, Slot(join.id, number), derived(workflow, join.id, number))
        found.append(branch_message(app, branch, root_id=workflow, parent_id=request.id))
    return found


def name_of(slot: Slot) -> str:
    """The join of what the member in ``slot`` adds."""
    return f"{slot.join.rstrip('!').partition('+')[0]}.{slot.index}"

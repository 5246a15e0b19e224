"""``umbel workflow``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import click

from umbel.cli.output import clean_lines, emit, table
from umbel.cli.session import Group, Session, json_option, pass_session

NO_WORKFLOW: Final = 3
"""Exit status."""


@click.group("workflow", cls=Group)
def command() -> None:
    """List, show, cancel or retry workflows.

    That is chords, groups that something follows, and all that is made of them. The id is `workflow` of the handle that
    sending one returns; `list` has it too.

    \b
    Examples:
      umbel -A tasks workflow list
      umbel -A tasks workflow show 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e
    """


@command.command("list")
@click.option("--limit", default=50, show_default=True, help="Show no more than these, the newest.")
@json_option
@pass_session
def list_workflows(session: Session, *, limit: int, as_json: bool) -> None:
    """List the workflows that the result store knows.

    \b
    Example:
      umbel -A tasks workflow list
    """
    from umbel.canvas.picture import listed  # here and not above: `umbel --help` is to cost little

    rows = [
        (datetime.fromtimestamp(sent, UTC).isoformat(timespec="seconds"), workflow, names)
        for sent, workflow, names in listed(session.app())[:limit]
    ]
    if as_json:
        emit([{"sent": sent, "id": workflow, "tasks": names} for sent, workflow, names in rows])
    else:
        click.echo(table(("sent", "id", "tasks"), rows))


@command.command("show")
@click.argument("workflow", metavar="ID")
@click.option("--mermaid", is_flag=True, help="Print a Mermaid flow chart.")
@json_option
@pass_session
@click.pass_context
def show(ctx: click.Context, session: Session, *, workflow: str, mermaid: bool, as_json: bool) -> None:
    """Draw a workflow with the present state of each task.

    Exits with 1 if it has failed, with 3 if nothing is stored of it.

    \b
    Example:
      umbel -A tasks workflow show 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e
    """
    from umbel.canvas.picture import standing  # here and not above: `umbel --help` is to cost little

    found = standing(session.app(), workflow)
    if found is None:
        click.echo(f"nothing is stored of workflow {workflow}", err=True)
        ctx.exit(NO_WORKFLOW)
    if as_json:
        emit(found.to_plain())
    else:
        click.echo(found.mermaid() if mermaid else clean_lines("\n".join(found.lines())))
    ctx.exit(int(found.state in ("FAILURE", "REVOKED")))


@command.command("cancel")
@click.argument("workflow", metavar="ID")
@click.option("--running/--no-running", default=True, show_default=True, help="End the tasks that run, too.")
@pass_session
def cancel(session: Session, *, workflow: str, running: bool) -> None:
    """Let no task of a workflow start any more.

    \b
    Example:
      umbel -A tasks workflow cancel 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e
    """
    from umbel.canvas.again import cancel as end  # here and not above: `umbel --help` is to cost little

    kept = end(session.app(), workflow, terminate=running)
    click.echo("cancelled" if kept else "told to the running workers; the result store cannot keep it for later ones")


@command.command("retry")
@click.argument("workflow", metavar="ID")
@click.argument("node", metavar="[TASK]", required=False)
@pass_session
def retry(session: Session, *, workflow: str, node: str | None) -> None:
    """Send what has failed in a workflow again, or just the task of that id. What succeeded is not run again.

    It goes on under a new id, which is printed; its tasks keep theirs.

    \b
    Example:
      umbel -A tasks workflow retry 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e
    """
    from umbel.canvas.again import retry as again  # here and not above: `umbel --help` is to cost little

    new, number = again(session.app(), workflow, node)
    click.echo(f"{number} {'task' if number == 1 else 'tasks'} sent again in workflow {new}")

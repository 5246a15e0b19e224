"""``umbel shell``."""

from __future__ import annotations

import code
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from umbel.cli.output import count
from umbel.cli.session import Command, Session, pass_session


@click.command("shell", cls=Command)
@click.option("--plain", is_flag=True, help="Plain Python, even if IPython is installed.")
@pass_session
def command(session: Session, *, plain: bool) -> None:
    """Open Python with the app and its tasks.

    app is the app, tasks are its tasks by name, and each task is there under its function's name too.

    \b
    Example:
      umbel -A tasks shell
      >>> add.delay(2, 3).get(timeout=5)
    """
    app = session.app()
    app.load_tasks()
    names: dict[str, Any] = {name.rpartition(".")[2]: task for name, task in app.tasks.items()}
    names |= {"app": app, "tasks": app.tasks}
    if not plain and find_spec("IPython") is not None:
        import_module("IPython").start_ipython(argv=[], user_ns=names)
        return
    code.interact(banner=f"app is {app!r}; {count(len(app.tasks), 'task')} in tasks", local=names, exitmsg="")

"""What a worker that is the first process of a container does for all others in it.

Whatever loses its parent in a PID namespace becomes a child of the first process: the programs that a task left behind when
its own process was killed or replaced. When they end, the first process must collect them, or each stays in the process table
for ever. A worker cannot: to wait for any child takes the exit status of one away from who started it. So the first process
forks the worker, and does nothing but collect and pass signals on.
"""

from __future__ import annotations

import os
import signal
from typing import Final

_PASSED_ON: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)


def serve_below() -> None:
    """Go on in a child, of which this process collects all orphans until it ends, and then ends as it has ended.

    Returns in the child, which has a process group of its own: a terminal's Ctrl-C comes to it once, passed on. To be called
    before this process has threads.
    """
    watched = {*_PASSED_ON, signal.SIGCHLD}
    # Blocked, and so kept until `sigwait` asks, whoever has which handler: nothing can be missed, also not before the fork.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            os.kill(child, number)  # not collected yet, and so still there
        elif (status := _collect(child)) is not None:
            os._exit(status)


def _collect(child: int) -> int | None:
    """Collect everything that has ended; the exit status to pass on, as a shell would tell it, if ``child`` is among it."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return None
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code

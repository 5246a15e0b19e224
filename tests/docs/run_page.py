"""``python run_page.py PAGE``: run the examples of a page in the working directory, in the order in which they stand.

Python blocks share one namespace. Prints what went wrong, with the page's line, and exits with 1.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from blocks import Block, blocks_of, commands

sys.path[0] = os.getcwd()  # where the pages' own modules are

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SCRIPTS = str(Path(sys.executable).parent)
ENVIRONMENT = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}


class Wrong(Exception):
    """An example does not do what its page says."""


def same(expected: str, actual: str) -> bool:
    return doctest.OutputChecker().check_output(expected.replace("…", "..."), actual, FLAGS)


def drain(stream: IO[str]) -> None:
    """Read on, so that a full pipe never stops who writes."""
    with stream:
        stream.read()


class Page:
    def __init__(self) -> None:
        self.main = ModuleType("__main__")
        self.workers: list[subprocess.Popen[str]] = []

    def run(self, block: Block) -> None:
        match block.language:
            case "act":
                word, _, command = block.text.partition(": ")
                if word == "start":
                    self.start_worker(command, "")
                else:
                    self.stop_worker()
            case "python" | "toml" if block.note.startswith("file: "):
                path = Path(block.note.removeprefix("file: "))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            case "python" if block.note.startswith("compiled only"):
                compile(block.text, "example", "exec")
            case "python":
                code = compile("\n" * (block.line - 1) + block.text, "example", "exec", dont_inherit=True)
                exec(code, vars(self.main))
            case "pycon":
                self.run_session(block)
            case "console" if block.note.startswith("run"):
                for command, expected in commands(block.text):
                    if block.note == "run: in background":
                        self.start_worker(command, expected)
                    else:
                        self.run_command(command, expected, int(block.note.partition("exits with ")[2] or 0))

    def run_session(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(
            block.text.replace("…", "..."), vars(self.main), "example", None, block.line - 1
        )
        report: list[str] = []
        failed, _ = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(
            test, out=report.append, clear_globs=False
        )
        vars(self.main).update(test.globs)  # doctest works on a copy
        if failed:
            raise Wrong("".join(report))

    def run_command(self, command: str, expected: str, status: int) -> None:
        done = subprocess.run(
            ["sh", "-c", command],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode != status or not same(expected, done.stdout):
            raise Wrong(f"$ {command}\nexit status {done.returncode}, expected {status}, and:\n{done.stdout}")

    def start_worker(self, command: str, expected: str) -> None:
        """Start it and wait until it says that it is ready; what it has said by then is what the page shows."""
        worker = subprocess.Popen(
            shlex.split(command), env=ENVIRONMENT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.workers.append(worker)
        assert worker.stderr is not None
        said = ""
        for line in worker.stderr:
            said += line
            if line.rstrip().endswith("is ready"):
                break
        else:
            raise Wrong(f"$ {command}\nhas ended with {worker.wait(30)}:\n{said}")
        threading.Thread(target=drain, args=[worker.stderr], daemon=True).start()
        if expected and not same(expected, said):
            raise Wrong(f"$ {command}\nsays:\n{said}")

    def stop_worker(self) -> None:
        worker = self.workers.pop()
        worker.send_signal(signal.SIGTERM)
        if status := worker.wait(timeout=30):
            raise Wrong(f"the worker has ended with status {status}")


def with_free_ports(text: str) -> str:
    for port in re.findall(r"^<!-- port: (\d+) -->$", text, re.MULTILINE):
        with socket.create_server(("127.0.0.1", 0)) as server:
            text = text.replace(port, str(server.getsockname()[1]))
    return text


def main(path: Path) -> int:
    page = Page()
    sys.modules["__main__"] = page.main
    block: Any = None
    try:
        for block in blocks_of(with_free_ports(path.read_text())):
            page.run(block)
        while page.workers:
            page.stop_worker()
    except BaseException as error:  # an example may raise anything, and all of it is news
        import traceback

        text = str(error) if isinstance(error, Wrong) else "".join(traceback.format_exception(error, limit=-4))
        print(f"{path}:{block.line}: {text}\nThe example:\n{block.text}")
        return 1
    finally:
        for worker in page.workers:
            worker.kill()
            worker.wait(30)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))

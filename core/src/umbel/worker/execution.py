"""The straight way of one job, where user code runs: decode, find, call, conclude. One executor a child.

``execute`` takes plain data and returns plain data; whatever user code raises becomes an outcome.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from umbel import errors, protocol, unique
from umbel import task as task_module
from umbel.app import Umbel
from umbel.canvas.graph import tasks_in
from umbel.errors import DecodeError, EncodeError, Ignore, Reject, Replaced, Retry, TaskCancelled
from umbel.finding import find_app
from umbel.model import Message, Outcome, Result, State, Verdict, evolve, make_outcome
from umbel.ports import interruption
from umbel.ports.pool import Upcall
from umbel.protocol import NO_EMBED, Invocation
from umbel.shared import live_app
from umbel.task import Request, Task, _current, make_request, typing_of_tasks
from umbel.unique import HEADER as UNIQUE
from umbel.uplink import UplinkGateway
from umbel.worker import attempts, causes, coroutines, followups, own_loop
from umbel.worker.builtins import builtin
from umbel.worker.coroutines import Coroutines
from umbel.worker.forwarding import forwarded
from umbel.worker.logs import start_log
from umbel.worker.outcomes import Records

logger = logging.getLogger("umbel.task")

Payload = tuple[str, tuple[Any, ...], str, int, str]
"""What a job carries: mode (``run``, ``key``, or the verdict to conclude with), message, queue, delivery count, detail."""

_CONCLUSIONS: Mapping[str, tuple[Verdict, type[errors.UmbelError]]] = {
    Verdict.LOST.value: (Verdict.LOST, errors.WorkerLost),
    Verdict.TIMED_OUT.value: (Verdict.TIMED_OUT, errors.TimeLimitExceeded),
    Verdict.REVOKED.value: (Verdict.REVOKED, errors.TaskRevoked),
}


def _load(app: str | None, token: int, pid: int, command_line: Mapping[str, Any], file: str | None) -> Umbel:
    found = live_app(token)
    if found is None or (app is not None and found.reference != app):
        assert app is not None
        found = find_app(app)
        if found._loaded is None:
            found.configure(file=file, command_line=command_line)
    found.load_tasks()
    if os.getpid() != pid:
        start_log(found)
    return found


def make_executor(
    upcall: Upcall,
    *,
    app: str | None,
    token: int,
    pid: int,
    hostname: str,
    command_line: Mapping[str, Any],
    file: str | None,
    reply_to: str | None = None,
) -> TaskExecutor:
    """The executor for this process (see ``ExecutorFactory``). In a child, its app is tied to the parent."""
    found = _load(app, token, pid, command_line, file)
    if os.getpid() != pid:
        found.use_gateway(UplinkGateway(upcall, reply_to))
    return TaskExecutor(found, hostname)


def preload(
    *,
    app: str | None,
    token: int,
    pid: int,
    command_line: Mapping[str, Any],
    file: str | None,
    **of_children: object,
) -> None:
    """Import what a child will need, once, in the process that children are forked from."""
    found = _load(app, token, pid, command_line, file)
    _ = found.codec.accepted, found.codec.accepted_compression, found.result_codec.accepted, found.client


make_executor.preload = preload  # type: ignore[attr-defined]  # what a fork server looks for


class TaskExecutor(Coroutines):
    """Runs jobs of one app. Thread-safe."""

    def __init__(self, app: Umbel, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._records = Records(app, hostname)
        self._tells = app.settings.results.track != "end" and self._records.kept
        self._timezone = app.timezone
        self._largest = app.settings.codec.max_body_size
        self._before = app.plugins.observer("umbel_before_task")
        self._after = app.plugins.observer("umbel_after_task")
        self._compose([*app.middleware, *app.plugins.contributions("umbel_add_middleware", app=app)])
        if started := app.plugins.observer("umbel_child_started"):
            started(app=app)

    # --- the port's side ---

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run one job to its end; see ``Executor``."""
        mode, plain, queue, count, detail = payload
        message = Message.from_plain(plain)
        started = time.monotonic()
        try:
            if mode == "run":
                outcome = self._run(message, queue, count, started)
            elif mode == "key":
                outcome = self._forward(message, queue)
            else:
                outcome = self._conclude(message, queue, count, *_CONCLUSIONS[mode], detail)
        except TaskCancelled:
            outcome = Outcome(verdict=Verdict.CANCELLED, task_id=message.id, task=message.task)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # the soft limit, or a fault, while the outcome was being written
            outcome = self._unwritten(message, exc)
        return self._records.to_plain(outcome, message)

    def _unwritten(self, message: Message, exc: BaseException) -> Outcome:
        logger.exception("task %s[%s]: its outcome could not be written", message.task, message.id)
        return self._records.ended(Verdict.FAILURE, message, exc, detail=causes.line(exc))

    # --- steps ---

    def _read(self, message: Message) -> Invocation:
        codec, headers, body, kind = self._app.codec, message.headers, message.body, message.content_type
        compression = headers.get("compression")
        alone = None if compression or len(body) > self._largest else protocol.args_alone(body, kind)
        if alone is not None:
            try:  # half of the time of reading it whole
                given = [codec.decode(alone, kind), {}, protocol.NO_EMBED_PLAIN]
                return protocol.read_invocation(headers, given, self._timezone)
            except DecodeError:
                pass  # told of the whole
        return protocol.read_invocation(headers, codec.decode(body, kind, compression), self._timezone)

    def _find(self, invocation: Invocation) -> Task[..., Any]:
        followups.check_supported(invocation.embed, chords_kept=self._app.chords is not None)
        try:
            return self._app.tasks[invocation.task]
        except errors.UnknownTask:
            if (found := builtin(self._app, invocation.task)) is None:
                raise
            return found

    def _open(self, message: Message, queue: str, count: int) -> Request | Outcome:
        """What is to be called; or the outcome of what is not."""
        try:
            invocation = self._read(message)
        except DecodeError as exc:
            return self._records.ended(Verdict.UNREADABLE, message, exc)
        try:
            task = self._find(invocation)
        except (DecodeError, errors.UnknownTask) as exc:
            verdict = Verdict.UNREADABLE if isinstance(exc, DecodeError) else Verdict.UNKNOWN_TASK
            return self._records.ended(verdict, message, exc, invocation=invocation)
        request = make_request(task, invocation, message, count, self._hostname, time.monotonic())
        if invocation.eta is not None and (wait := invocation.eta - self._app.clock.time()) > protocol.EARLY:
            return Outcome(verdict=Verdict.RETURNED, task_id=request.id, task=task.name, delay=wait)
        if invocation.expires is not None and self._app.clock.time() > invocation.expires:
            return self._finish(request, queue, Verdict.EXPIRED, State.REVOKED, errors.TaskRevoked("expired"))
        return request

    def _run(self, message: Message, queue: str, count: int, started: float) -> Outcome:
        request = self._open(message, queue, count)
        if isinstance(request, Outcome):
            return request
        if self._tells or request.task.options.track_started or UNIQUE in message.headers:
            self._begin(request)
        token = _current.set(request)
        try:
            if self._before:
                self._before(request=request)
            outcome = self._attempt(request, queue, started, self._wrapped)
            if self._after:
                self._after(request=request, outcome=outcome)
        finally:
            _current.reset(token)
        return outcome

    def _attempt(self, request: Request, queue: str, started: float, call: Callable[[Request], Any]) -> Outcome:
        """Call the task; every branch makes one outcome."""
        task = request.task
        try:
            value = call(request)
            outcome = self._succeeded(request, queue, value, time.monotonic() - started)
            self._handle(task, "on_success", value, request.id, request.args, request.kwargs)
            return outcome
        except Retry as exc:
            return self._retried(request, queue, exc.delay, exc.cause or exc)
        except Replaced as exc:
            return self._replaced(request, exc.canvas)
        except Ignore:
            return Outcome(verdict=Verdict.IGNORED, task_id=request.id, task=task.name)
        except Reject as exc:
            verdict = Verdict.REQUEUED if exc.requeue else Verdict.REJECTED
            if exc.requeue:
                return Outcome(verdict=verdict, task_id=request.id, task=task.name, detail=causes.text(exc.reason))
            return self._failed(request, queue, exc, verdict)
        except TaskCancelled:
            return Outcome(verdict=Verdict.CANCELLED, task_id=request.id, task=task.name)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            options = task.options
            spent = options.max_retries is not None and request.retries >= options.max_retries
            wanted = isinstance(exc, options.autoretry_for) and not isinstance(exc, options.dont_autoretry_for)
            if wanted and not spent:
                return self._retried(request, queue, task.backoff(request.retries), exc)
            return self._failed(request, queue, exc)

    def _invoke(self, request: Request) -> Any:
        """The innermost call: arguments as annotated, then the function; the coroutine of one that is ``async``."""
        task, args, kwargs = request.task, request.args, request.kwargs
        if task.options.typed:
            args, kwargs = typing_of_tasks().structure_arguments(task.run, task.bind, args, kwargs)
        return task(*args, **kwargs)

    # --- ends ---

    def _succeeded(self, request: Request, queue: str, value: Any, runtime: float) -> Outcome:
        task = request.task
        plain = value
        if task.options.typed:
            plain = typing_of_tasks().unstructure(value, f"the result of task {task.name!r}")
        messages = () if request.invocation.embed is NO_EMBED else followups.on_success(self._app, request, plain)
        children = (*request.children, *[m.id for m in messages]) if messages or request.children else ()
        try:
            results = self._record(request, queue, State.SUCCESS, plain, children=children)
        except EncodeError as exc:
            raise EncodeError(f"the result of task {task.name!r} cannot be stored: {exc}") from exc
        return make_outcome(Verdict.SUCCESS, request.id, task.name, results, tuple(messages), "", None, runtime)

    def _retried(self, request: Request, queue: str, delay: float, exc: BaseException) -> Outcome:
        text = causes.format_exception(exc, _OWN_FILES)
        due = self._app.clock.time() + delay if delay > 0 else None
        again = followups.retry_message(request.message, request.invocation, queue, due, self._app)
        again = attempts.noted(again, attempts.history(request, causes.line(exc), self._app.clock.time()))
        self._handle(request.task, "on_retry", exc, request.id, request.args, request.kwargs, text)
        return Outcome(
            verdict=Verdict.RETRY,
            task_id=request.id,
            task=request.task.name,
            results=self._record(request, queue, State.RETRY, exc, traceback=text),
            follow_ups=(again,),
            detail=f"retry in {delay:.3g} s: {causes.line(exc)}",
            traceback=text,
        )

    def _replaced(self, request: Request, canvas: Any) -> Outcome:
        return Outcome(
            verdict=Verdict.RETRY,  # as with a retry, the task has not ended: its id goes on
            task_id=request.id,
            task=request.task.name,
            follow_ups=tuple(followups.replacement(self._app, request, canvas)),
            detail=f"replaced by {canvas}",
        )

    def _failed(self, request: Request, queue: str, exc: BaseException, verdict: Verdict = Verdict.FAILURE) -> Outcome:
        expected = isinstance(exc, request.task.options.throws)
        text = causes.format_exception(exc, _OWN_FILES)
        outcome = self._finish(request, queue, verdict, State.FAILURE, exc, None if expected else text)
        self._handle(request.task, "on_failure", exc, request.id, request.args, request.kwargs, text)
        return outcome

    def _finish(
        self,
        request: Request,
        queue: str,
        verdict: Verdict,
        state: State,
        exc: BaseException,
        traceback: str | None = None,
    ) -> Outcome:
        """An end that is not success: its record, its errbacks, and the same record for the rest of its chain."""
        results = list(self._record(request, queue, state, exc, traceback=traceback))
        try:
            messages = followups.on_failure(self._app, request, exc)
        except Exception:  # an errback may name a plugin that is not there; that must not hide why the task failed
            logger.exception("the errbacks of task %s[%s] cannot be sent", request.task.name, request.id)
            messages = []
        for plain in tasks_in(request.invocation.embed.chain):
            later, options = str(plain["options"]["task_id"]), plain["options"]
            reply = {"reply_to": options.get("reply_to") or request.message.properties.get("reply_to")}
            results += self._records.final(later, state, exc, headers={"task": plain["task"]}, properties=reply)
        return Outcome(
            verdict=verdict,
            task_id=request.id,
            task=request.task.name,
            results=tuple(results),
            follow_ups=tuple(messages),
            detail=causes.line(exc),
            traceback=traceback,
        )

    def _forward(self, message: Message, queue: str) -> Outcome:
        """Send a message again with what a limit asks of its body; the task is not called."""
        try:
            return forwarded(self._app, message, self._read(message), queue)
        except DecodeError as exc:
            return self._records.ended(Verdict.UNREADABLE, message, exc)

    def _conclude(
        self,
        message: Message,
        queue: str,
        count: int,
        verdict: Verdict,
        cls: type[errors.UmbelError],
        detail: str,
    ) -> Outcome:
        """Write the end of a task whose process was lost or killed, or that is revoked; the task is not called."""
        exc = cls(detail)
        state = State.REVOKED if verdict is Verdict.REVOKED else State.FAILURE
        try:
            invocation = self._read(message)
        except DecodeError:
            return self._records.ended(verdict, message, exc, state=state)
        try:
            task = self._find(invocation)
        except (DecodeError, errors.UnknownTask):
            return self._records.ended(verdict, message, exc, state=state, invocation=invocation)
        request = Request(task=task, invocation=invocation, message=message, delivery_count=count)
        outcome = self._finish(request, queue, verdict, state, exc)
        if state is State.REVOKED:  # its chord hears of it; no errback does, as where nobody reads the body
            return evolve(outcome, follow_ups=())
        self._handle(task, "on_failure", exc, request.id, request.args, request.kwargs, detail)
        return outcome

    # --- helpers ---

    def _record(
        self,
        request: Request,
        queue: str,
        state: State,
        value: Any,
        *,
        traceback: str | None = None,
        children: tuple[str, ...] = (),
    ) -> tuple[Result, ...]:
        if not self._records.kept or self._ignored(request):
            return ()
        history: Sequence[attempts.Attempt] = ()
        if state is State.RETRY or attempts.wanted(request.message.headers):
            error = causes.line(value) if isinstance(value, BaseException) else None
            history = attempts.history(request, error, self._app.clock.time())
        return self._records.final(
            request.id,
            state,
            value,
            headers=request.message.headers or {"task": request.task.name, "group": request.group},
            properties=request.message.properties,
            traceback=traceback,
            children=children,
            queue=queue,
            call=(request.args, request.kwargs),
            attempts=history,
        )

    def _ignored(self, request: Request) -> bool:
        ignored = request.invocation.ignore_result
        return request.task.options.ignore_result if ignored is None else ignored

    def _begin(self, request: Request) -> None:
        """The work begins: free a key that is unique until now, and store STARTED where that is wanted. Blocks."""
        if UNIQUE in request.message.headers:
            unique.started(self._app, request.message)
        if request.task.options.track_started or (self._tells and not self._ignored(request)):
            self._track(request)

    def _track(self, request: Request) -> None:
        try:
            meta = {"pid": os.getpid(), "hostname": self._hostname}
            self._app.client.put_state(request, State.STARTED, meta)
        except errors.UmbelError as exc:  # knowing that it runs is worth less than running it
            logger.warning("task %s[%s]: STARTED could not be stored: %s", request.task.name, request.id, exc)

    def _handle(self, task: Task[..., Any], handler: str, *args: Any) -> None:
        try:
            getattr(task, handler)(*args)
        except Exception:
            logger.exception("%s of task %s raised; the task's outcome stands", handler, task.name)


_OWN_FILES = frozenset({__file__, *(m.__file__ for m in (coroutines, own_loop, interruption, task_module))})

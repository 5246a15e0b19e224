"""One exception tree. Every message says who, what, and the setting or command that mends it."""

from __future__ import annotations

from collections.abc import Sequence


class UmbelError(Exception):
    """Base of everything Umbel raises on purpose."""


# --- configuration and plugins ------------------------------------------------------------------


class SettingsError(UmbelError):
    """One or more settings are wrong. ``problems`` holds one sentence for each, all found at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class PluginError(UmbelError):
    """A plugin cannot be used."""


class PluginNotFound(PluginError):
    """No installed distribution offers the named plugin."""


class PluginDependencyMissing(PluginError):
    """The plugin is installed, but a library that it imports is not."""


class PluginBroken(PluginError):
    """The plugin is installed, but loading it raised, or what it loads is not of its port."""


class PluginConflict(PluginError):
    """Two distributions offer the same name in the same group."""


class PluginApiMismatch(PluginError):
    """The plugin was written for another version of the port than this kernel has."""


class NotSupported(UmbelError):
    """A driver was asked for an ability that it does not declare."""


# --- sending ------------------------------------------------------------------------------------


class PublishError(UmbelError):
    """The broker has not confirmed every message within the deadline, or refused one.

    Whether an unconfirmed message arrived is unknown; sending it again under the same task id is safe
    for idempotent tasks only.
    """


class BrokerUnavailable(PublishError):
    """The broker cannot be reached, or stopped answering. Passing: worth another try."""


class PublishRefused(PublishError):
    """The broker answered, and said no (size, permission, unknown exchange). Permanent; one that is full is unavailable."""


class ResultStoreUnavailable(UmbelError):
    """The result store cannot be reached. Passing: worth another try."""


class ResultRefused(UmbelError):
    """The result store answered, and will never take this record (too large, a value it cannot hold). Permanent."""


class SchedulerUnavailable(UmbelError):
    """The store of periodic entries cannot be reached. Passing: worth another try."""


class EncodeError(UmbelError):
    """A value cannot be serialised. Raised at the call, before anything is sent."""


# --- receiving ----------------------------------------------------------------------------------


class DecodeError(UmbelError):
    """Bytes cannot be turned into a message. The only error that decoding raises."""


class ContentRefused(DecodeError):
    """The content type or the compression is not in the accept-list, or the body is too large."""


class UnknownTask(UmbelError):
    """No task of that name is registered here."""


# --- schedules ---------------------------------------------------------------------------------


class UnknownSchedule(UmbelError):
    """The scheduler store has no entry of that name."""


class ScheduleRefused(UmbelError):
    """An entry of a schedule cannot be kept as it is given, or may not be changed so."""


# --- results ------------------------------------------------------------------------------------


class ResultTimeout(UmbelError, TimeoutError):
    """The result did not come within the time asked for. The task itself is not affected."""


class TaskFailed(UmbelError):
    """The task raised something that cannot be rebuilt here; ``type_name`` is its qualified name."""

    def __init__(self, type_name: str, message: str, traceback: str | None = None) -> None:
        super().__init__(f"{type_name}: {message}" if message else type_name)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback


class TaskRevoked(UmbelError):
    """The task was revoked, or expired, before it ended."""


class DuplicateTask(TaskRevoked):
    """The call was not sent: another with the same unique key waits or runs. ``existing`` is that one's id."""

    def __init__(self, task_id: str, task: str, existing: str) -> None:
        super().__init__(task_id, task, existing)  # what it is made of anew from its record
        self.task_id = task_id
        self.task = task
        self.existing = existing

    def __str__(self) -> str:
        return f"task {self.task}[{self.task_id}] was not sent: {self.existing} has the same unique key"


class ChordError(UmbelError):
    """A call was not started, because a member of the group that it was to get the results of has failed."""


class WorkflowBroken(UmbelError):
    """A workflow cannot go on: it was not sent whole, or what was to start its next step was lost. The text says which."""


class WorkerLost(UmbelError):
    """The process that ran the task died while running it."""


class TimeLimitExceeded(UmbelError):
    """The hard time limit passed; the process that ran the task was killed."""


class MaxRetriesExceeded(UmbelError):
    """``self.retry()`` was called more often than ``max_retries`` allows."""


# --- locks --------------------------------------------------------------------------------------


class LockTimeout(UmbelError, TimeoutError):
    """The lock was not free within the time given for it."""


class LockLost(UmbelError):
    """The lock's lease ended while it was held: it could not be renewed, or another has taken it."""


# --- raised inside a task -----------------------------------------------------------------------


class SoftTimeLimitExceeded(Exception):  # the field's name; not an UmbelError: tasks catch it
    """Raised inside the task when its soft time limit passes."""


class TaskCancelled(BaseException):  # BaseException, so that `except Exception` cannot swallow it
    """Raised inside the task when it is cancelled while it runs."""


class Ignore(Exception):  # a verdict, not an error; the field's name
    """Raised by a task to say: acknowledge me, store nothing."""


class Reject(Exception):  # a verdict, not an error; the field's name
    """Raised by a task to refuse its delivery: to the dead letters, or back to the queue with ``requeue``."""

    def __init__(self, reason: object = None, requeue: bool = False) -> None:
        super().__init__(reason, requeue)
        self.reason = reason
        self.requeue = requeue


class Replaced(Exception):  # a verdict, not an error
    """What ``self.replace()`` raises: another call goes on in the task's place."""

    def __init__(self, canvas: object) -> None:
        super().__init__(canvas)
        self.canvas = canvas


class Retry(Exception):  # a verdict, not an error; the field's name
    """What ``self.retry()`` raises: the task is to be sent again after ``delay`` seconds."""

    def __init__(self, delay: float = 0.0, cause: BaseException | None = None) -> None:
        super().__init__(delay)
        self.delay = delay
        self.cause = cause

"""Wrong pools."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from attrs import evolve

from umbel.model import Completion, Ending, Job
from umbel.ports.pool import PoolContext, Running
from umbel.testing.contracts import PoolContract

from ..honest.pool import HonestChildren, HonestCrowd, HonestPool, ModestPool, Run
from .house import MANY, House


class PoolCage(PoolContract):
    driver: ClassVar[type[ModestPool]]
    patience, quiet, time_limit, many, limit, chances = 2.0, 0.04, 30.0, MANY, 0.1, 30

    @pytest.fixture
    def make_pool(self) -> Callable[[], ModestPool]:
        return self.driver

    @pytest.fixture
    def make_crowd(self) -> Callable[[], ModestPool] | None:
        if not issubclass(self.driver, HonestCrowd):
            return None

        def make() -> ModestPool:
            pool = self.driver()
            assert isinstance(pool, HonestCrowd)
            pool.crowded = True
            return pool

        return make


HOUSE = House(__file__, PoolCage, ModestPool, HonestPool, HonestChildren, HonestCrowd)


@HOUSE.breaks("each_of_thousands_of_jobs_ends_once")
class ReportsTwice(HonestPool):
    def report(self, end: Completion) -> None:
        super().report(end)
        if end.job_id == MANY // 2 and end.payload and end.payload[0] == "echo":
            super().report(end)


@HOUSE.breaks("each_of_thousands_of_jobs_ends_once")
class ForgetsAJob(HonestPool):
    def report(self, end: Completion) -> None:
        if end.job_id != MANY // 2 or end.payload is None or end.payload[0] != "echo":
            super().report(end)


@HOUSE.breaks("a_cancellation_never_hits_the_next_job")
class CancelsTheNextJob(HonestPool):
    hit: ClassVar[int] = 0

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        done = await super().cancel(job_id, force=force)
        if not done and self.pending:
            self.hit = self.pending[-1].id
        return done

    def report(self, end: Completion) -> None:
        super().report(evolve(end, ending=Ending.CANCELLED, payload=None) if end.job_id == self.hit else end)


@HOUSE.breaks("recall_gives_back_what_has_not_started")
class DropsWhatItRecalls(HonestPool):
    async def recall(self) -> None:
        self.pending.clear()


@HOUSE.breaks("no_job_runs_on_the_event_loop")
class RunsOnTheLoop(HonestPool):
    def launch(self, run: Run) -> None:
        if run.job.payload[0] == "where":
            self.work(run)
        else:
            super().launch(run)


@HOUSE.breaks("as_many_jobs_run_at_once_as_there_are_slots")
class RunsTooMany(HonestPool):
    def room(self) -> int:
        return super().room() + (self.slots == 2 and len(self.pending) == 2 and self.queued == 4)

    queued: int = 0

    def submit(self, jobs: Sequence[Job]) -> None:
        self.queued += len([job for job in jobs if job.payload[0] == "wait"])
        super().submit(jobs)


@HOUSE.breaks(
    "what_escapes_the_executor_ends_its_own_job_only[exit]",
    "what_escapes_the_executor_ends_its_own_job_only[interrupt]",
)
class TellsNoDetail(HonestPool):
    def told(self, error: BaseException) -> str:
        return ""


@HOUSE.breaks("the_error_of_an_upcall_is_raised_in_the_job", "a_coroutine_ends_as_any_job")
class SwallowsErrorsOfUpcalls(HonestPool):
    def answer(self, result: Callable[[], Any]) -> Any:
        try:
            return super().answer(result)
        except Exception:
            return None


@HOUSE.breaks("a_pool_wants_work_when_idle_and_less_the_more_it_has")
class WantsEverMore(HonestPool):
    @property
    def free(self) -> int:
        return max(1, super().free)


@HOUSE.breaks("a_running_job_is_cancelled_and_no_other")
class CancelsNothing(HonestPool):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        return job_id in self.runs if not force and not self.pending else await super().cancel(job_id, force=force)


@HOUSE.breaks("the_soft_time_limit_is_raised_in_the_job")
class IgnoresTheSoftLimit(HonestPool):
    def soft_limit(self, run: Run) -> None:
        pass


@HOUSE.breaks("a_job_that_runs_can_be_given_another_limit")
class SaysItLimits(HonestPool):
    def limit(self, job_id: int, *, time_limit: float | None, soft_time_limit: float | None) -> bool:
        return job_id in self.runs


@HOUSE.breaks("the_hard_time_limit_ends_a_job_that_does_not_listen")
class IgnoresTheHardLimit(HonestPool):
    def arm(self, run: Run) -> None:
        super().arm(Run(evolve(run.job, time_limit=None), raising=run.raising, timers=run.timers))


@HOUSE.breaks("limits_that_are_not_reached_harm_nobody")
class LimitsTheNextJob(HonestPool):
    def soft_limit(self, run: Run) -> None:
        for running in self.runs.values():
            super().soft_limit(running)

    def disarm(self, run: Run) -> None:
        pass

    def kill(self, run: Run, ending: Ending) -> None:
        if run.job.id in self.runs:
            super().kill(run, ending)


@HOUSE.breaks("slots_can_be_added_and_taken_away")
class NeverShrinks(HonestPool):
    async def resize(self, concurrency: int) -> None:
        await super().resize(max(self.slots, concurrency))


@HOUSE.breaks(
    "an_application_that_does_not_load_says_why[make_broken-no such module]",
    "an_application_that_does_not_load_says_why[make_exiting-bad application]",
)
class StartsWhateverHappens(HonestPool):
    async def start(self, context: PoolContext) -> None:
        try:
            await super().start(context)
        except Exception:
            pass  # the fault


@HOUSE.breaks("stop_lets_what_runs_end_and_gives_back_the_rest", "a_second_stop_shortens_the_wait")
class StopsAtOnce(HonestPool):
    async def stop(self, *, timeout: float) -> None:
        await super().stop(timeout=0)


@HOUSE.breaks("stop_ends_what_does_not_end_in_time")
class CallsItDone(HonestPool):
    async def stop(self, *, timeout: float) -> None:
        self.short = timeout == 0.05 and not self.stopping
        await super().stop(timeout=timeout)

    def kill(self, run: Run, ending: Ending) -> None:
        super().kill(run, Ending.LOST if self.stopping and self.short else ending)


@HOUSE.breaks("no_thread_is_left_behind")
class PoolLeaksAThread(HonestPool):
    async def start(self, context: PoolContext) -> None:
        await super().start(context)
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()


@HOUSE.breaks("no_task_is_left_behind")
class PoolLeaksATask(HonestPool):
    async def start(self, context: PoolContext) -> None:
        await super().start(context)
        self.task = asyncio.ensure_future(asyncio.sleep(3600))


@HOUSE.breaks("a_driver_says_what_it_is")
class HasNoName(HonestPool):
    name = ""


@HOUSE.breaks("what_the_executor_returns_is_the_jobs_end")
class RoundsFractions(HonestPool):
    def report(self, end: Completion) -> None:
        if end.payload is not None:
            end = evolve(end, payload=tuple(int(v) if isinstance(v, float) else v for v in end.payload))
        super().report(end)


@HOUSE.breaks("large_payloads_go_both_ways")
class CutsLargePayloads(HonestPool):
    def report(self, end: Completion) -> None:
        if end.payload is not None:
            end = evolve(end, payload=tuple(v[: 1 << 20] if isinstance(v, bytes) else v for v in end.payload))
        super().report(end)


@HOUSE.breaks("upcalls_are_answered")
class MixesUpAnswers(HonestPool):
    asked: int = 0

    async def ask(self, verb: str, payload: Any) -> Any:
        self.asked += verb == "double"
        return await super().ask(verb, payload if self.asked != 50 else 0)


@HOUSE.breaks("a_job_that_has_not_started_is_cancelled_by_giving_it_back")
class CallsItCancelled(HonestPool):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        self.asked = job_id
        return await super().cancel(job_id, force=force)

    def report(self, end: Completion) -> None:
        returned = end.ending is Ending.RETURNED and end.job_id == getattr(self, "asked", 0)
        super().report(evolve(end, ending=Ending.CANCELLED) if returned else end)


@HOUSE.breaks("a_job_that_has_ended_or_never_was_cannot_be_cancelled")
class SaysYesToAnyCancel(HonestPool):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        await super().cancel(job_id, force=force)
        return True


@HOUSE.breaks("force_ends_a_job_that_does_not_listen")
class ForcesNothing(HonestPool):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        return await super().cancel(job_id, force=False)


@HOUSE.breaks("what_runs_is_told_and_nothing_else")
class TellsWhatWaitsToo(HonestPool):
    def running(self) -> Mapping[int, Running]:
        now = time.monotonic()
        waiting = {job.id: Running(since=now, pid=self.process) for job in self.pending}
        return {**super().running(), **waiting}


@HOUSE.breaks("stop_before_start_ends_the_completions")
class StopsWhatHasStarted(HonestPool):
    async def stop(self, *, timeout: float) -> None:
        if self.slots:
            await super().stop(timeout=timeout)


@HOUSE.breaks("no_file_or_socket_is_left_behind")
class PoolLeaksAFile(HonestPool):
    async def start(self, context: PoolContext) -> None:
        await super().start(context)
        os.open(os.devnull, os.O_RDONLY)


@HOUSE.breaks("no_process_is_left_behind")
class PoolLeaksAProcess(HonestPool):
    async def start(self, context: PoolContext) -> None:
        await super().start(context)
        # Not holding what pytest writes to: who reads that to its end would wait for the process.
        silent = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        os.posix_spawn("/bin/sleep", ["sleep", "20"], {}, file_actions=silent)  # noqa: ASYNC221  # it waits for nothing


@HOUSE.breaks("a_crash_takes_only_its_own_job_along")
class CrashesAltogether(HonestChildren):
    def crashed(self, run: Run, end: Completion) -> None:
        for other in list(self.runs.values()):
            self.kill(other, Ending.LOST)
        super().crashed(run, end)


@HOUSE.breaks("children_are_replaced_after_a_number_of_tasks")
class NeverReplacesAChild(HonestChildren):
    def child(self) -> int:
        return self.process


@HOUSE.breaks("a_coroutine_ends_as_any_job")
class KnowsNoCoroutines(HonestPool):
    def report(self, end: Completion) -> None:
        unknown = end.payload == ("answer", 8) and self.asked == "a_ask"
        super().report(evolve(end, payload=("answer", None)) if unknown else end)

    def launch(self, run: Run) -> None:
        self.asked = run.job.payload[0]
        super().launch(run)


# --- what ends a child ends all that runs in it ---


@HOUSE.breaks("many_jobs_run_at_once_in_one_child")
class TellsAProcessForEachJob(HonestCrowd):
    def running(self) -> Mapping[int, Running]:
        told = super().running()
        if not self.crowded:
            return told
        return {job: evolve(running, pid=running.pid + job) for job, running in told.items()}


@HOUSE.breaks("what_runs_beside_a_job_over_its_hard_limit_is_collateral")
class BlamesWhatIsBesideALimit(HonestCrowd):
    def kill(self, run: Run, ending: Ending) -> None:
        if self.crowded and ending is Ending.TIMED_OUT:
            HonestPool.kill(self, run, ending)
            for beside in list(self.runs.values()):
                HonestPool.kill(self, beside, ending)
        else:
            super().kill(run, ending)


@HOUSE.breaks("what_runs_beside_a_job_that_is_cancelled_by_force_is_collateral")
class CancelsWhatIsBeside(HonestCrowd):
    def kill(self, run: Run, ending: Ending) -> None:
        if self.crowded and ending is Ending.CANCELLED:
            HonestPool.kill(self, run, ending)
            for beside in list(self.runs.values()):
                HonestPool.kill(self, beside, ending)
        else:
            super().kill(run, ending)


@HOUSE.breaks("a_cancellation_spares_what_runs_beside")
class KillsForEveryCancellation(HonestCrowd):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        return await super().cancel(job_id, force=force or self.crowded)


@HOUSE.breaks("a_crash_of_many_is_told_of_all_that_ran_and_of_nothing_else")
class CallsACrashReturned(HonestCrowd):
    def crashed(self, run: Run, end: Completion) -> None:
        if self.crowded:
            HonestChildren.crashed(self, run, end)
            self.take_along(Ending.RETURNED)
        else:
            super().crashed(run, end)


# --- what it does not declare, it neither does nor seems to do ---


@HOUSE.breaks("a_running_job_is_cancelled_and_no_other")
class SaysItCancels(ModestPool):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        return await super().cancel(job_id, force=force) or (job_id in self.runs and not force)


@HOUSE.breaks("force_ends_a_job_that_does_not_listen")
class KillsUndeclared(ModestPool):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        if force and (run := self.runs.get(job_id)) is not None:
            self.kill(run, Ending.CANCELLED)
        return await super().cancel(job_id, force=force)


@HOUSE.breaks("the_soft_time_limit_is_raised_in_the_job")
class LimitsSoftlyUndeclared(ModestPool):
    def arm(self, run: Run) -> None:
        if run.job.soft_time_limit is not None and run.job.payload[0] == "soft":
            run.timers.append(self.loop.call_later(run.job.soft_time_limit, self.soft_limit, run))


@HOUSE.breaks("the_hard_time_limit_ends_a_job_that_does_not_listen")
class LimitsHardUndeclared(ModestPool):
    def arm(self, run: Run) -> None:
        if run.job.time_limit is not None:
            run.timers.append(self.loop.call_later(run.job.time_limit, self.kill, run, Ending.TIMED_OUT))


@HOUSE.breaks("slots_can_be_added_and_taken_away")
class IgnoresAResize(ModestPool):
    async def resize(self, concurrency: int) -> None:
        pass


@HOUSE.breaks("a_driver_says_what_it_is")
class HasAMainThreadUndeclared(ModestPool):
    def run_main_thread(self) -> None:
        pass


globals().update(HOUSE.tests())

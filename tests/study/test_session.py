"""How often a run evaluates a job whose worker is lost."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

from ranksearch.plan import Plan
from ranksearch.results.messages import Job, Outcome, Result
from ranksearch.results.trials import MAX_TRIES
from ranksearch.study.session import Session


def test_a_job_that_keeps_losing_its_worker_is_given_up():
    tries, done = Counter(), set()

    class Losing:
        def run(self, jobs, evaluate, *, on_message, should_stop):
            for job in jobs:
                tries[job.key] += 1
                lost = job.key == 0 or (job.key == 1 and tries[0] >= MAX_TRIES)
                on_message(job, Result(Outcome.WORKER_LOST if lost else Outcome.DONE))

    def jobs():
        return (Job(key, Plan(), 0) for key in range(3) if key not in done)

    def on_result(job, result):
        if result.outcome is not Outcome.WORKER_LOST and tries[0] > 1:
            done.add(job.key)

    session = SimpleNamespace(engine=Losing(), stage=lambda name: nullcontext(lambda: None))
    Session.run_jobs(session, "finalists", jobs, None, on_result)
    assert tries[0] == MAX_TRIES

"""Follow a job: print its log until it ends, and say how it ended."""

from __future__ import annotations

import asyncio
import re
import sys
import time

import aiohttp
from ray.job_submission import JobStatus

from raydetr.console import duration, print_status
from raydetr.submission.cluster import Cluster, ClusterError, UnreachableError
from raydetr.submission.jobs import resume_command

# Exit codes of a command that has followed a job; 2 is that of a wrong option
EXIT_CODES = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 3}
LOST, DETACHED = 4, 130

PENDING_SECONDS = 10.0  # before a line about a job that does not start
WAITING_SECONDS = 30.0  # between two such lines
POLL_SECONDS = 2.0
RECONNECT_SECONDS = 60.0  # without an answer, after which the cluster is given up
SILENT_SECONDS = 60.0  # without a line; a dead connection gives no sign, such as after a laptop slept

NOT_INSTALLED = re.compile(r"No module named '?(raydetr|detrs)\b|raydetr: (command )?not found")


def follow(cluster: Cluster, name: str) -> int:
    """Print the log of a job until it ends, then how it ended; return the exit code.

    A connection that breaks is made again for RECONNECT_SECONDS, one without a line for SILENT_SECONDS too.

    Raises:
        ClusterError: there is no such job.
        BrokenPipeError: nobody reads standard output any more.
    """
    cluster.job(name)
    try:
        return asyncio.run(_Follower(cluster, name).run())
    except KeyboardInterrupt:
        sys.stdout.flush()
        print_status(f"\ndetached: {name} goes on\n{how_to_come_back(cluster, name)}")
        return DETACHED


def how_to_come_back(cluster: Cluster, name: str) -> str:
    """Return the commands about a job that goes on."""
    at = f"{name} --address {cluster.address}"
    return f"  log   raydetr jobs logs {at}\n  stop  raydetr jobs stop {at}\n  see   {cluster.address}/#/jobs/{name}"


def report_end(cluster: Cluster, name: str) -> int:
    """Print how a job ended; return the exit code."""
    job = cluster.job(name)
    took = duration(((job.end_time or 0) - (job.start_time or 0)) / 1000)
    if job.status == JobStatus.SUCCEEDED:
        print_status(f"{name} succeeded after {took}")
    elif job.status == JobStatus.STOPPED:
        print_status(f"{name} was stopped after {took}; {resume_command(cluster, job)}")
    else:
        message = job.message or ""
        if job.driver_exit_code is None:  # it did not start, or Ray lost it: the log says nothing about that
            print_status(message)
        if NOT_INSTALLED.search(message):
            print_status(
                "error: raydetr is not installed on the cluster: install the same version on all of its nodes, or "
                "submit from a checkout, which is uploaded (docs/jobs.md)"
            )
        code = "" if job.driver_exit_code is None else f", exit code {job.driver_exit_code}"
        print_status(f"error: {name} failed after {took}{code}; {resume_command(cluster, job)}")
    return EXIT_CODES[job.status]


class _Follower:
    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self._printed = 0  # characters of the log
        self._failing_since: float | None = None

    async def run(self) -> int:
        watcher = asyncio.create_task(self._watch_pending())
        try:
            while True:
                try:
                    is_complete = await self._tail()
                    job = await asyncio.to_thread(self._cluster.job, self._name)
                    self._failing_since = None
                    if is_complete and job.status.is_terminal():
                        return report_end(self._cluster, self._name)
                except BrokenPipeError:
                    raise  # of standard output, as of `| head`: errors of connections arrive as others
                except (UnreachableError, aiohttp.ClientError, OSError, RuntimeError) as error:
                    if isinstance(error, ClusterError) and not isinstance(error, UnreachableError):
                        raise  # such as a new head, which does not know the job
                    now = time.monotonic()
                    if self._failing_since is None:
                        self._failing_since = now
                    if now - self._failing_since > RECONNECT_SECONDS:
                        print_status(
                            f"error: {self._cluster.address} has not answered for {RECONNECT_SECONDS:.0f} s. If its "
                            "head has died, submit again with the name of the run, which goes on. Otherwise:\n"
                            f"{how_to_come_back(self._cluster, self._name)}"
                        )
                        return LOST
                await asyncio.sleep(POLL_SECONDS)
        finally:
            watcher.cancel()

    async def _tail(self) -> bool:
        """Print what is new in the log; return whether it has ended, and not only been silent for long."""
        skip = self._printed
        texts = self._cluster.client.tail_job_logs(self._name)
        while True:
            try:
                async with asyncio.timeout(SILENT_SECONDS) as limit:
                    text = await anext(texts)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                if not limit.expired():
                    raise  # of the connection
                return False
            self._failing_since = None
            new, skip = text[skip:], max(0, skip - len(text))
            self._printed += len(new)
            sys.stdout.write(new)
            sys.stdout.flush()

    async def _watch_pending(self) -> None:
        """Say what a job that does not start waits for."""
        tell_at = time.monotonic() + PENDING_SECONDS
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                job = await asyncio.to_thread(self._cluster.job, self._name)
                if job.status != JobStatus.PENDING:
                    return
                if time.monotonic() > tell_at:
                    resources = await asyncio.to_thread(self._cluster.resources)
                    print_status(f"{self._name} is pending: {job.message} ({resources})")
                    tell_at = time.monotonic() + WAITING_SECONDS
            except ClusterError:  # reported by whoever reads the log
                continue

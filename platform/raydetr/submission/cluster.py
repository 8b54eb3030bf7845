"""Talk to the dashboard of a Ray cluster, whose errors become one sentence each."""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from raydetr.config import nearest

ADDRESS = "http://127.0.0.1:8265"
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray reads them in this order
# Loggers of Ray with levels of their own; they print a line for each .gitignore and each connection
TALKATIVE = ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk")
CONNECT_SECONDS = 10.0


class ClusterError(RuntimeError):
    """The cluster does not answer, or refuses the request; the message has the address and the remedy."""


class UnreachableError(ClusterError):
    """No dashboard answers at the address, now."""


class Cluster:
    """The dashboard of a cluster.

    Args:
        address: URL of the dashboard; None: that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or `ADDRESS`.

    Raises:
        ClusterError: no Ray dashboard answers there, or it refuses the token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = _url(address)
        _check_answers(self.address)
        # Ray lets this variable win over the argument
        os.environ[VARIABLES[0]] = self.address
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self.errors():
            self.client = JobSubmissionClient(self.address)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translate errors of Ray's client.

        Raises:
            UnreachableError: no dashboard answers.
            ClusterError: it refuses a request.
        """
        try:
            yield
        except AuthenticationError as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise ClusterError(
                f"{self.address} requires a token ({reason}): set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN to the token of the cluster (`ray get-auth-token` on its head prints it) or "
                "RAY_AUTH_TOKEN_PATH to its file"
            ) from None
        except (requests.ConnectionError, requests.Timeout, ConnectionError) as error:
            raise UnreachableError(_unreachable(self.address, error)) from None
        except (requests.RequestException, RayStateApiException, RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, ClusterError):
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()
            raise ClusterError(
                f"{self.address}: {first[-1] if 'Traceback' in first[0] else first[0]}"
            ) from None

    def jobs(self) -> list[JobDetails]:
        """Return the jobs that were submitted, the newest first.

        Raises:
            ClusterError: the cluster does not answer.
        """
        _check_answers(self.address)
        with self.errors():
            jobs = [job for job in self.client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: -(job.start_time or 0))

    def job(self, name: str) -> JobDetails:
        """Return a job.

        Raises:
            ClusterError: there is none with this id, or the cluster does not answer.
        """
        jobs = {str(job.submission_id): job for job in self.jobs()}
        if name not in jobs:
            raise ClusterError(
                f"{self.address} has no job {name}{nearest(name, jobs)}; `raydetr jobs list` lists them. A head that "
                "was started anew knows no earlier jobs: submit again, with the same --name"
            )
        return jobs[name]

    def resources(self) -> str:
        """Describe the resources of the nodes that live."""
        with self.errors():
            nodes = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], detail=True)
        totals = [node.resources_total or {} for node in nodes]
        cpus, gpus = (sum(total.get(name, 0) for total in totals) for name in ("CPU", "GPU"))
        nodes_word = "node" if len(totals) == 1 else "nodes"
        return f"the cluster has {cpus:.0f} CPUs and {gpus:.0f} GPUs on {len(totals)} {nodes_word}"


def _url(address: str | None) -> str:
    given = [os.environ.get(name, "") for name in VARIABLES]
    address = address or given[0] or (given[1] if given[1].startswith("http") else "") or ADDRESS
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ClusterError(f"{address}: is not the URL of a Ray dashboard, such as {ADDRESS}")
    return url


def _check_answers(url: str) -> None:
    """Check that a server answers in time; Ray's client would wait for ever."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:  # an answer, which the client explains
        return
    except (OSError, ValueError) as error:
        raise UnreachableError(_unreachable(url, error)) from None


def _unreachable(url: str, error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return (
        f"no Ray dashboard answers at {url} ({reason}): is the cluster up, and `ray dashboard` or a port forwarding to "
        "it running?"
    )

"""Check that a Ray cluster answers at an address, before Ray waits for it for minutes or ends the process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from urllib.parse import urlsplit

from ray._private import services

from raydetr.config import ConfigError
from raydetr.doctor.machine import socket_problem

CONNECT_SECONDS = 10.0  # for a connection to the port
ANSWER_SECONDS = (
    15.0  # for an answer of the head, in a process of its own, because Ray ends the process without a token
)
_PROBE = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


def check_address(address: str) -> None:
    """Check an address, which may also be "local" or "auto".

    Raises:
        ConfigError: it is not one of a cluster for training, or TMPDIR is too long for a new one.
        ConnectionError: no cluster answers there, or it refuses the token.
    """
    if address == "local":
        problem = socket_problem()
        if problem is not None:
            raise ConfigError(problem)
        return
    if address == "auto":
        address = _address_of_this_machine()
    what = f"cluster.address={address}"
    if address.startswith("ray://"):
        raise ConfigError(
            f"{what} is one of Ray Client, with which Ray cannot train: submit a job, `raydetr submit train ... "
            f"--address http://{urlsplit(address).hostname}:8265`, or give HOST:6379 on a machine of the cluster"
        )
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{what} is that of the dashboard, to which jobs are submitted: `raydetr submit train ... --address "
            f"{address}`. A driver on a machine of the cluster needs HOST:6379"
        )
    found = re.fullmatch(r"\[?([^\]/]+?)\]?:(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"{what} is not HOST:PORT, such as 10.0.0.1:6379")
    try:
        socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"{what}: no connection ({error}): is the head running (`ray start --head`), and does its firewall let "
            "this machine in?"
        ) from None
    _ask(address, what)


def _ask(address: str, what: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConnectionError(
            f"{what}: what listens there does not answer as the head of a Ray cluster: give the head's port, 6379 "
            "unless `ray start --head --port` said otherwise"
        ) from None
    if done.returncode == 0:
        return
    if "token" in done.stderr.lower():
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise ConnectionError(
            f"{what}: the cluster wants another token, or none was found: set RAY_AUTH_MODE=token (now {mode}), and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"
        )
    lines = done.stderr.strip().splitlines() or ["no reason"]
    raise ConnectionError(f"{what}: {lines[-1]}")


def _address_of_this_machine() -> str:
    addresses = sorted(services.find_gcs_addresses())  # type: ignore[no-untyped-call]
    if not addresses:
        raise ConnectionError(
            "cluster.address=auto: there is no Ray cluster on this machine: start one with `ray start --head`, or omit "
            "cluster.address to use a new one for this run"
        )
    return str(addresses[0])

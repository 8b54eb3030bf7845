"""Remote shards from real servers on loopback: the samples are those of the folder, or an error is raised."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from faulty_proxy import Fault, FaultyProxy, Kind
from object_stores import CREDENTIALS, S3Server, WebServer
from raydetr.config import RemoteConfig
from raydetr.shards.reader import ShardError, Shards, open_shards
from raydetr.shards.remote.reading import merge
from raydetr.store.retry import RemoteError

READ_TIMEOUT = 1.0  # moto takes longer than 0.4 s now and then, beside other tests
QUICK = RemoteConfig(connect_timeout=2.0, read_timeout=READ_TIMEOUT, retry_seconds=2.0)
MAX_SECONDS = 2 * 4 * READ_TIMEOUT + 8  # of a read that fails in all attempts, on a busy machine


@pytest.fixture(scope="module")
def web(shards: Shards) -> Iterator[WebServer]:
    server = WebServer(shards.path)
    yield server
    server.close()


@pytest.fixture(scope="module")
def s3(shards: Shards) -> Iterator[S3Server]:
    server = S3Server()
    server.upload(shards.path, "shards/train")
    yield server
    server.close()


@pytest.fixture(scope="module")
def buckets(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A server that poses as Google's and Azure's storage, which no emulator offers in the form obstore uses."""
    root = tmp_path_factory.mktemp("buckets")
    shutil.copytree(shards.path, root / "bucket" / "shards" / "train")
    server = WebServer(root)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["http", "s3", "gs", "az"])
def remote(request: pytest.FixtureRequest) -> Iterator[tuple[str, RemoteConfig, FaultyProxy]]:
    """Location, settings to read it, and the proxy in front of its server."""
    name = {"http": "web", "s3": "s3", "gs": "buckets", "az": "buckets"}[request.param]
    proxy = FaultyProxy(request.getfixturevalue(name).address)
    options = {
        "http": {},
        "s3": {"endpoint": proxy.url},
        "gs": {"base_url": proxy.url, "skip_signature": True},
        "az": {"endpoint": proxy.url, "skip_signature": True, "account_name": "account"},
    }[request.param]
    location = proxy.url if request.param == "http" else f"{request.param}://bucket/shards/train"
    yield location, QUICK.model_copy(update={"options": options}), proxy
    proxy.close()


def forget_copies() -> None:
    for folder in Path(tempfile.gettempdir()).glob("raydetr-*"):
        shutil.rmtree(folder)


def test_samples_are_those_of_the_folder(
    shards: Shards, remote: tuple[str, RemoteConfig, FaultyProxy]
) -> None:
    location, settings, _ = remote
    opened = open_shards(location, remote=settings)
    assert opened.location == location
    assert opened.fingerprint == shards.fingerprint
    everything = range(shards.num_samples)
    assert opened.read_many(everything) == shards.read_many(everything)
    assert opened.read(7) == opened.reread(7) == shards.read(7)
    assert opened.coco() == shards.coco()
    assert pickle.loads(pickle.dumps(opened)).read(3) == shards.read(3)


def test_file_urls_are_folders(shards: Shards, tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    shutil.copytree(shards.path, folder)
    opened = open_shards(folder.as_uri())
    assert opened.path == folder
    assert opened.read(3) == shards.read(3)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no program `openssl`")
def test_https_needs_a_certificate_that_is_trusted(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    names += ["-addext", "basicConstraints=critical,CA:FALSE"]
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    both = tmp_path / "both.pem"
    both.write_text((tmp_path / "key.pem").read_text() + certificate.read_text())
    server = WebServer(shards.path, certificate=both)
    with pytest.raises(RemoteError, match=r"manifest.json: the server's certificate is not trusted"):
        open_shards(server.url, remote=QUICK)
    assert server.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    opened = open_shards(server.url, remote=QUICK)
    assert opened.location.startswith("https://")
    assert opened.read_many(range(53)) == shards.read_many(range(53))
    server.close()


# --- fault injection

FAULTS: list[Kind] = ["stall", "reset", "short", "drip", "refuse", "busy"]


def test_occasional_failures_change_nothing(
    shards: Shards, remote: tuple[str, RemoteConfig, FaultyProxy]
) -> None:
    location, settings, proxy = remote
    opened = open_shards(location, remote=settings)
    kinds = FAULTS if location.startswith("http") else ["reset", "busy"]
    for kind in kinds:
        begun = proxy.num_requests
        proxy.faults = lambda request, n=begun, kind=kind: (
            Fault(kind, 1000) if request - n in (0, 3) else None
        )
        began = time.monotonic()
        for chosen in (range(0, 20), range(50, 20, -7)):
            assert opened.read_many(chosen) == shards.read_many(chosen)
        assert time.monotonic() - began < 2 * MAX_SECONDS
    assert [fault.kind for fault in proxy.injected] == [kind for kind in kinds for _ in range(2)]


@pytest.mark.parametrize("etags", [True, False])
def test_received_bytes_are_not_fetched_again(shards: Shards, etags: bool) -> None:
    server = WebServer(shards.path)
    server.etags = etags
    proxy = FaultyProxy(server.address)
    opened = open_shards(proxy.url, remote=QUICK)
    row = shards.samples[5]
    offset, length = int(row["offset"]), int(row["length"])
    begun = proxy.num_requests
    # Not a reset, which may take what was received and not yet read with it
    breaks = {begun: Fault("short", 700), begun + 1: Fault("short", 300)}
    proxy.faults = breaks.get
    assert opened.read(5) == shards.read(5)
    starts = (offset, offset + 700, offset + 1000)
    assert [wanted for _, wanted in server.requests[-3:]] == [
        f"bytes={start}-{offset + length - 1}" for start in starts
    ]
    proxy.close()
    server.close()


@pytest.mark.parametrize("remote", ["http", "s3"], indirect=True)
def test_a_server_that_keeps_failing_is_an_error_within_the_time_limits(
    remote: tuple[str, RemoteConfig, FaultyProxy],
) -> None:
    location, settings, proxy = remote
    opened = open_shards(location, remote=settings)
    for kind in FAULTS if location.startswith("http") else ("stall", "short"):
        proxy.faults = lambda request, kind=kind: Fault(kind, 10)
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"shard-00000.tar: no answer for \d+ s, in \d+ attempts \("):
            opened.read_many([2, 3])
        assert time.monotonic() - began < MAX_SECONDS
    with pytest.raises(RemoteError, match=r"no answer for \d+ s, in \d+ attempts \("):
        open_shards(location, remote=settings)


def test_an_unreachable_server_is_an_error(shards: Shards) -> None:
    proxy = FaultyProxy(("127.0.0.1", 9))
    proxy.close()
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"manifest.json: .*onnection refused.*data.remote.retry_seconds"):
        open_shards(proxy.url, remote=QUICK)
    assert time.monotonic() - began < MAX_SECONDS


def test_a_bit_flipped_in_transfer_is_found(
    shards: Shards, remote: tuple[str, RemoteConfig, FaultyProxy]
) -> None:
    location, settings, proxy = remote
    opened = open_shards(location, remote=settings)
    rng = np.random.default_rng(0)
    length = int(shards.samples[20]["length"])
    for place in rng.integers(0, length, 8).tolist():
        begun = proxy.num_requests
        proxy.faults = lambda request, n=begun, at=place: Fault("corrupt", at) if request == n else None
        (found,) = opened.read_many([20])
        assert isinstance(found, ShardError)
        assert f"{location}/shard-00001.tar: sample {shards.key(20)}" in str(found)
        assert opened.reread(20) == shards.read(20)


def test_corrupt_manifest_and_index_are_fetched_again(
    shards: Shards, remote: tuple[str, RemoteConfig, FaultyProxy]
) -> None:
    location, settings, proxy = remote
    for wrong in (1, 3):  # manifest, index: each after a request for its version
        begun = proxy.num_requests
        forget_copies()
        proxy.faults = lambda request, n=begun + wrong: Fault("corrupt", 30) if request == n else None
        assert open_shards(location, remote=settings).read(4) == shards.read(4)
        assert len(proxy.injected) == (1 + wrong) // 2
    forget_copies()
    proxy.faults = lambda request: Fault("corrupt", 30)
    with pytest.raises(ValueError, match=r"manifest.json: .*write the shards again"):
        open_shards(location, remote=settings)


# --- servers with invalid responses


def test_a_server_without_ranges_is_an_error(shards: Shards) -> None:
    server = WebServer(shards.path, ranges=False)
    with pytest.raises(
        RemoteError, match=r"with the complete file: shards need a server that supports Range"
    ):
        open_shards(server.url, remote=QUICK)
    server.close()


def test_a_server_that_sends_less_than_requested_is_an_error(shards: Shards) -> None:
    server = WebServer(shards.path)
    opened = open_shards(server.url, remote=QUICK)
    server.longest = int(shards.samples[9]["length"]) // 2
    with pytest.raises(RemoteError, match=r"shard-00000.tar: .*Requested \d+\.\.\d+, got \d+\.\.\d+"):
        opened.read(9)
    server.close()


def test_a_compressing_server_is_an_error(shards: Shards) -> None:
    server = WebServer(shards.path)
    server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(RemoteError, match="has Content-Encoding gzip: store it as it is"):
        open_shards(server.url, remote=QUICK)
    server.close()


@pytest.mark.parametrize("corrupt", ["missing", "longer"])
@pytest.mark.parametrize("scheme", ["http", "gs"])
def test_sizes_are_checked_before_anything_is_read(
    shards: Shards, tmp_path: Path, corrupt: str, scheme: str
) -> None:
    folder = tmp_path / "root" / "bucket" / "copy"
    shutil.copytree(shards.path, folder)
    server = WebServer(tmp_path / "root")
    location, options = f"{server.url}/bucket/copy", {}
    if scheme == "gs":
        location, options = "gs://bucket/copy", {"base_url": server.url, "skip_signature": True}
    settings = QUICK.model_copy(update={"options": options})
    assert open_shards(location, remote=settings).read(0) == shards.read(0)
    if scheme == "gs":
        assert sum("list-type" in path for path, _ in server.requests) == 1  # one listing for all shards
        assert not any("shard" in path for path, _ in server.requests[:-1])
    if corrupt == "missing":
        (folder / "shard-00002.tar").unlink()
        message = "shard-00002.tar is missing: copy these"
    else:
        with (folder / "shard-00002.tar").open("ab") as file:
            file.write(bytes(512))
        message = r"shard-00002.tar has \d+ bytes instead of \d+: copy these"
    with pytest.raises(ValueError, match=message):
        open_shards(location, remote=settings)
    assert open_shards(location, remote=settings, sizes_known=True).read(0) == shards.read(0)
    server.close()


def test_a_shard_replaced_after_opening_is_an_error(shards: Shards, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    server = WebServer(folder)
    opened, shard = open_shards(server.url, remote=QUICK), folder / "shard-00000.tar"
    assert opened.read(3) == shards.read(3)
    shard.write_bytes(shard.read_bytes())
    os.utime(shard, (0, 0))  # the file has another ETag, and the same size
    with pytest.raises(RemoteError, match=r"shard-00000.tar: was replaced while it was in use \(version "):
        opened.read(4)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(RemoteError, match=r"shard-00000.tar: .*(it ends before|has 1000 bytes instead of)"):
        open_shards(server.url, remote=QUICK, sizes_known=True).read(3)
    server.close()


def test_a_folder_without_shards_is_an_error(remote: tuple[str, RemoteConfig, FaultyProxy]) -> None:
    location, settings, proxy = remote
    begun = proxy.num_requests
    with pytest.raises(
        ValueError, match=r"/nothing: no shards found there \(no manifest.json\); copy a folder"
    ):
        open_shards(f"{location}/nothing", remote=settings)
    assert proxy.num_requests - begun == 1  # a missing file is not requested again


# --- requests


def test_nearby_ranges_share_a_request() -> None:
    spans = [(0, 3300, 10), (0, 0, 1000), (0, 1100, 100)]
    assert merge(spans, 1000) == [(0, 1200, [spans[1], spans[2]]), (3300, 3310, [spans[0]])]
    assert merge(spans, 10**6) == [(0, 3310, [spans[1], spans[2], spans[0]])]


def test_a_batch_of_neighbours_is_one_request(shards: Shards, web: WebServer) -> None:
    opened = open_shards(web.url, remote=QUICK)
    begun = len(web.requests)
    opened.read_many(range(2, 9))
    assert len(web.requests) - begun == 1


def test_requests_go_out_together_and_connections_are_kept(shards: Shards, web: WebServer) -> None:
    proxy = FaultyProxy(web.address, latency=0.1)
    opened = open_shards(proxy.url, remote=QUICK)
    begun = proxy.num_requests
    for _ in range(3):
        opened.read_many(range(0, 53, 15))
    assert proxy.num_requests - begun == 12
    assert 4 <= proxy.num_connections <= 8
    proxy.close()


# --- options and credentials


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[str, dict[str, object], str]] = [
        (
            "s3://b/x",
            {"endpoint_url": "http://h"},
            r"options.endpoint_url has no effect on s3:// .* endpoint",
        ),
        ("s3://b/x", {"secret_access_key": "s"}, "credentials come from the environment"),
        ("gs://b/x", {"bearer_token": "b"}, "credentials come from the environment"),
        ("http://h/x", {"endpoint": "http://h"}, r"no effect on http:// locations: known are headers"),
        ("http://h/x", {"headers": {"Authorization": "Bearer x"}}, "RAYDETR_HTTP_HEADERS"),
        ("http://h/x", {"headers": ["a"]}, "not a mapping"),
    ]
    for location, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_shards(location, remote=QUICK.model_copy(update={"options": options}))


def test_headers_of_options_and_environment_are_sent(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WebServer(shards.path)
    monkeypatch.setenv("RAYDETR_HTTP_HEADERS", '{"Authorization": "Bearer secret"}')
    settings = QUICK.model_copy(update={"options": {"headers": {"X-Team": "a"}}})
    assert open_shards(server.url, remote=settings).num_samples == 53
    sent = server.seen_headers[0]
    assert (sent["authorization"], sent["x-team"]) == ("Bearer secret", "a")
    server.close()


def test_a_missing_bucket_has_no_shards(s3: S3Server) -> None:
    settings = QUICK.model_copy(update={"options": {"endpoint": s3.url}})
    with pytest.raises(ValueError, match="no shards found there"):
        open_shards("s3://another-bucket/x", remote=settings)


# --- once per node


def test_manifest_and_index_are_downloaded_once_per_node(shards: Shards, web: WebServer) -> None:
    """By opening in this process, and in another one; not after the file has changed."""
    server = WebServer(shards.path)
    code = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[2]; from raydetr.shards.reader import open_shards; "
        "print(open_shards(sys.argv[1], sizes_known=True).fingerprint)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, server.url, tempfile.gettempdir()]
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {rank.communicate(timeout=120)[0].strip() for rank in ranks} == {shards.fingerprint}
    open_shards(server.url, remote=QUICK, sizes_known=True)
    whole = [path for path, wanted in server.requests if wanted is None]
    assert sorted(whole) == ["/index.npz", "/manifest.json"]
    server.close()


def test_a_server_without_versions_shares_nothing(shards: Shards) -> None:
    server = WebServer(shards.path)
    server.etags = False
    for _ in range(2):
        open_shards(server.url, remote=QUICK, sizes_known=True)
    assert sum(wanted is None for _, wanted in server.requests) == 4
    server.close()


def test_a_folder_for_copies_that_cannot_be_written_is_no_obstacle(
    shards: Shards, web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    settings = QUICK.model_copy(update={"cache_dir": tmp_path / "file", "cache_gb": 1.0})
    assert open_shards(web.url, remote=settings).fingerprint == shards.fingerprint
    assert "manifest.json is not shared by the processes of this node" in caplog.text

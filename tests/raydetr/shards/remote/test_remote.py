"""Remote shards from real servers on loopback: the samples are those of the folder, or an error is raised."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from faulty_proxy import Fault, FaultyProxy, Kind
from object_stores import CREDENTIALS, GsServer, S3Server, WebServer
from raydetr.config import RemoteConfig
from raydetr.shards.reader import ShardError, Shards, open_shards
from raydetr.shards.remote.reading import merge
from raydetr.store.transfer import RemoteError

READ_TIMEOUT = 1.0  # the emulated stores take longer than 0.4 s now and then, beside other tests
QUICK = RemoteConfig(connect_timeout=2.0, read_timeout=READ_TIMEOUT, attempts=3, merge_gap_kb=2)
MAX_SECONDS = 3 * (READ_TIMEOUT + 0.1) + 6  # of a read that fails in all attempts, on a busy machine


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
def gs(shards: Shards) -> Iterator[GsServer]:
    server = GsServer()
    server.upload(shards.path, "shards/train")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["http", "s3", "gs"])
def remote(request: pytest.FixtureRequest) -> Iterator[tuple[str, RemoteConfig, FaultyProxy]]:
    """Location, settings to read it, and the proxy in front of its server."""
    server = request.getfixturevalue({"http": "web"}.get(request.param, request.param))
    proxy = FaultyProxy(server.address)
    options = {"s3": {"endpoint_url": proxy.url}, "gs": {"endpoint_url": proxy.url, "token": "anon"}}
    location = proxy.url if request.param == "http" else f"{request.param}://bucket/shards/train"
    yield location, QUICK.model_copy(update={"options": options.get(request.param, {})}), proxy
    proxy.close()


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
    for kind in FAULTS:
        begun = proxy.num_requests
        proxy.faults = lambda request, n=begun, kind=kind: (
            Fault(kind, 1000) if request - n in (0, 3) else None
        )
        began = time.monotonic()
        for chosen in (range(0, 20), range(50, 20, -7)):
            assert opened.read_many(chosen) == shards.read_many(chosen)
        assert time.monotonic() - began < 2 * MAX_SECONDS
    assert [fault.kind for fault in proxy.injected] == [kind for kind in FAULTS for _ in range(2)]


def test_received_bytes_are_not_fetched_again(shards: Shards, web: WebServer) -> None:
    proxy = FaultyProxy(web.address)
    opened = open_shards(proxy.url, remote=QUICK)
    row = shards.samples[5]
    offset, length = int(row["offset"]), int(row["length"])
    begun = proxy.num_requests
    proxy.faults = lambda request: Fault("reset", 700) if request == begun else None
    assert opened.read(5) == shards.read(5)
    ranges = [wanted for _, wanted in web.requests[-2:]]
    assert ranges == [
        f"bytes={offset}-{offset + length - 1}",
        f"bytes={offset + 700}-{offset + length - 1}",
    ]
    proxy.close()


@pytest.mark.parametrize("remote", ["http", "s3"], indirect=True)
def test_a_server_that_keeps_failing_is_an_error_within_the_time_limits(
    remote: tuple[str, RemoteConfig, FaultyProxy],
) -> None:
    location, settings, proxy = remote
    opened = open_shards(location, remote=settings)
    for kind in FAULTS if location.startswith("http") else ("stall", "short"):
        proxy.faults = lambda request, kind=kind: Fault(kind, 10)
        began = time.monotonic()
        with pytest.raises(
            RemoteError, match=r"shard-00000.tar: bytes \d+-\d+ could not be read: 3 attempts in"
        ):
            opened.read_many([2, 3])
        assert time.monotonic() - began < MAX_SECONDS
    with pytest.raises(RemoteError, match=r"manifest.json: bytes 0- could not be read: 3 attempts in"):
        open_shards(location, remote=settings)


def test_an_unreachable_server_is_an_error(shards: Shards) -> None:
    proxy = FaultyProxy(("127.0.0.1", 9))
    proxy.close()
    began = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"manifest.json: .*3 attempts.*no connection: .*refused.*data.remote"
    ):
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
    for wrong in (0, 1):  # manifest, index
        begun = proxy.num_requests
        proxy.faults = lambda request, n=begun + wrong: Fault("corrupt", 30) if request == n else None
        assert open_shards(location, remote=settings).read(4) == shards.read(4)
        assert len(proxy.injected) == wrong + 1
    proxy.faults = lambda request: Fault("corrupt", 30)
    with pytest.raises(ValueError, match=r"manifest.json: .*write the shards again"):
        open_shards(location, remote=settings)


# --- servers with invalid responses


def test_a_server_without_ranges_is_an_error(shards: Shards) -> None:
    server = WebServer(shards.path, ranges=False)
    with pytest.raises(
        ValueError, match=r"complete file \(HTTP 200\): shards need a server that supports Range"
    ):
        open_shards(server.url, remote=QUICK)
    server.close()


def test_short_responses_are_concatenated(shards: Shards) -> None:
    server = WebServer(shards.path)
    opened = open_shards(server.url, remote=QUICK)
    length = int(shards.samples[9]["length"])
    server.longest = length // 2 + 1
    assert opened.read(9) == shards.read(9)
    server.close()


def test_a_compressing_server_is_an_error(shards: Shards) -> None:
    server = WebServer(shards.path)
    server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(RemoteError, match="is sent with Content-Encoding gzip: store it as it is"):
        open_shards(server.url, remote=QUICK)
    server.close()


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        ("missing", r"shard-00002.tar: HTTP 404: it is not there"),
        ("longer", r"shard-00002.tar: has \d+ bytes instead of \d+: copy it again"),
    ],
)
def test_sizes_are_checked_before_anything_is_read(
    shards: Shards, tmp_path: Path, corrupt: str, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    if corrupt == "missing":
        (folder / "shard-00002.tar").unlink()
    else:
        with (folder / "shard-00002.tar").open("ab") as file:
            file.write(bytes(512))
    server = WebServer(folder)
    with pytest.raises(ValueError, match=message):
        open_shards(server.url, remote=QUICK)
    assert open_shards(server.url, remote=QUICK, sizes_known=True).read(0) == shards.read(0)
    server.close()


def test_a_shard_replaced_after_opening_is_an_error(shards: Shards, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    server = WebServer(folder)
    opened = open_shards(server.url, remote=QUICK)
    (folder / "shard-00000.tar").write_bytes((folder / "shard-00000.tar").read_bytes()[:1000])
    with pytest.raises(RemoteError, match=r"shard-00000.tar: (ends before byte|has 1000 bytes instead of)"):
        opened.read(3)
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
    spans = [(1, 5000, 100), (0, 0, 1000), (0, 1100, 100), (0, 3300, 10), (1, 0, 10)]
    found = [(request.shard, request.start, request.stop, request.wanted) for request in merge(spans, 1000)]
    assert found == [(0, 0, 1200, (1, 2)), (0, 3300, 3310, (3,)), (1, 0, 10, (4,)), (1, 5000, 5100, (0,))]
    assert len(merge(spans, 10**6)) == 2
    assert len(merge([(0, 0, 3_000_000), (0, 3_000_000, 3_000_000)], 10**6)) == 2


def test_a_batch_of_neighbours_is_one_request(shards: Shards, web: WebServer) -> None:
    opened = open_shards(web.url, remote=QUICK)
    begun = len(web.requests)
    opened.read_many(range(2, 9))
    assert len(web.requests) - begun == 1


def test_requests_go_out_together_and_connections_are_kept(shards: Shards, web: WebServer) -> None:
    proxy = FaultyProxy(web.address, latency=0.1)
    opened = open_shards(proxy.url, remote=QUICK.model_copy(update={"max_requests": 8, "merge_gap_kb": 0}))
    begun = proxy.num_requests
    began = time.monotonic()
    opened.read_many(range(0, 53, 7))
    seconds = time.monotonic() - began
    assert proxy.num_requests - begun == 8
    assert seconds < 0.7  # sequentially they take 0.8
    opened.read_many(range(0, 53, 7))
    assert proxy.num_connections <= 8
    proxy.close()


# --- options and credentials


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[str, dict[str, object], str]] = [
        ("s3://b/x", {"endpoint": "http://h"}, r"options.endpoint has no effect on s3:// .*endpoint_url"),
        ("s3://b/x", {"secret": "s"}, "credentials do not belong in settings"),
        ("gs://b/x", {"token": {"a": "b"}}, "credentials do not belong in settings"),
        ("http://h/x", {"endpoint_url": "http://h"}, r"no effect on http:// locations: known are headers"),
        ("http://h/x", {"headers": {"Authorization": "Bearer x"}}, "FSSPEC_HTTP"),
        ("http://h/x", {"headers": ["a"]}, "not a mapping"),
    ]
    for location, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_shards(location, remote=QUICK.model_copy(update={"options": options}))


def test_headers_of_options_and_environment_are_sent(shards: Shards, tmp_path: Path) -> None:
    server = WebServer(shards.path)
    code = (
        "import sys; from raydetr.shards.reader import open_shards; "
        "from raydetr.config import RemoteConfig; "
        "settings = RemoteConfig(options={'headers': {'X-Team': 'a'}}); "
        f"print(open_shards({server.url!r}, remote=settings).num_samples)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FSSPEC_HTTP": '{"client_kwargs": {"headers": {"Authorization": "Bearer secret"}}}',
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "53"
    sent = server.seen_headers[0]
    assert (sent["Authorization"], sent["X-Team"]) == ("Bearer secret", "a")
    server.close()


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3:// needs the package s3fs .*pip install s3fs"):
        open_shards("s3://bucket/x", remote=QUICK)


def test_a_missing_bucket_has_no_shards(s3: S3Server) -> None:
    settings = QUICK.model_copy(update={"options": {"endpoint_url": s3.url}})
    with pytest.raises(ValueError, match="no shards found there"):
        open_shards("s3://another-bucket/x", remote=settings)

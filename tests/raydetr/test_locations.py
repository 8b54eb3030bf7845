from __future__ import annotations

from pathlib import Path

import pytest

from raydetr import recipes
from raydetr.config import ConfigError, override, parse_assignments, to_dict
from raydetr.locations import absolute, check_location, check_tracking_uri, is_remote, local_folder


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (" ", "the location is empty"),
        ("ftp://host/x", r"ftp:// is not supported; known are folders and s3://, gs://"),
        ("s3:/bucket/x", "is not a URL: write s3://bucket/x"),
        ("https://", "has no bucket or server"),
        ("file://host/x", "a file URL has three slashes"),
        ("https://user:secret@host/x", r"https://host/x: a URL without user.*credentials come from the env"),
        ("https://host/x?token=1", r"https://host/x: a URL without user, '\?' and '#'"),
    ],
)
def test_invalid_locations_are_refused(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_location(location)
    assert "secret" not in str(caught.value)


def test_folders_and_urls() -> None:
    assert check_location("shards/train") == "shards/train"
    assert check_location("s3://bucket/shards/") == "s3://bucket/shards"
    assert [is_remote(text) for text in ("a/b", "file:///a", "gs://a/b", "HTTP://a/b")] == [
        False,
        False,
        True,
        True,
    ]
    assert local_folder("file:///a%20b/c") == Path("/a b/c")
    assert absolute("s3://bucket/x", Path("/base")) == "s3://bucket/x"
    assert absolute("x/y", Path("/base")) == "/base/x/y"
    assert absolute("file:///x/y", Path("/base")) == "/x/y"
    assert absolute("~/x", Path("/base")) == str(Path.home() / "x")


def test_a_url_survives_the_configuration() -> None:
    config = override(
        recipes.find("quickstart"),
        parse_assignments(
            [
                "data.synthetic=null", "data.train=s3://bucket/train",
                "data.remote.cache_dir=/fast/cache", "data.remote.cache_gb=1.5",
                "data.remote.options={skip_signature: true}", "data.remote.options.headers.X-Team=a",
                "data.remote.read_timeout=9",
            ]
        ),
    )  # fmt: skip
    assert to_dict(config)["data"]["train"] == "s3://bucket/train"
    remote = config.data.remote
    assert remote.options == {"skip_signature": True, "headers": {"X-Team": "a"}}
    assert (remote.cache_dir, remote.cache_gb) == (Path("/fast/cache"), 1.5)
    assert remote.read_timeout == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.remote.max_requests=3"], r"remote.max_requests has no effect: .*train and .*val are local"),
        (["data.remote.options.skip_signature=true"], "remote.options has no effect"),
        (
            ["data.remote.cache_dir=/c", "data.remote.cache_gb=3"],
            "remote.cache_dir, remote.cache_gb has no effect",
        ),
        (["data.remote.cache_dir=/c", "data.train=s3://b/x"], "cache_dir and cache_gb belong together"),
        (["data.remote.retry_second=3"], "did you mean data.remote.retry_seconds"),
        (["data.remote.options=3", "data.train=s3://b/x"], "data.remote.options: .*dictionary"),
    ],
)
def test_settings_without_effect_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(recipes.find("quickstart"), parse_assignments(arguments))


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite://x.db",
        "sqlite:x.db",
        "sqlite:///",
        "sqlite:///:memory:",
        "http://",
        "http:///x",
        "https://h:port",
    ],
)
def test_tracking_uris_that_name_nothing(uri: str) -> None:
    with pytest.raises(ValueError, match=r"write (sqlite:///FILE|http://HOST:PORT)"):
        check_tracking_uri(uri)


def test_tracking_uris_are_kept() -> None:
    for uri in (
        "sqlite:///x.db",
        "http://h:5000",
        "https://me:secret@h/path",
        "databricks",
        "mlruns",
        "postgresql://h/db",
    ):
        assert check_tracking_uri(uri) == uri


@pytest.mark.parametrize(
    "uri", ["http://me:s3cr3t@host:99999", "https://me:s3/cr3t@host", "http://me:s3cr3t@"]
)
def test_an_address_that_is_refused_shows_no_password(uri: str) -> None:
    with pytest.raises(ValueError, match="write http://HOST:PORT") as caught:
        check_tracking_uri(uri)
    assert "cr3t" not in str(caught.value)

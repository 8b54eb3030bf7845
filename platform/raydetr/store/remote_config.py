"""Define the settings of remote files: a section of the configuration that the store takes as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, JsonValue, PositiveInt, model_validator

from raydetr.section import Section


class RemoteConfig(Section):
    """Access to shards at s3://, gs://, az:// and http(s):// (docs/data/remote.md)."""

    # Passed to obstore, e.g. {endpoint: http://minio:9000}; no credentials, because settings are logged
    options: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it
    connect_timeout: float = Field(default=10.0, gt=0)  # seconds until a connection must be established
    read_timeout: float = Field(default=30.0, gt=0)  # seconds without data before a request is repeated
    retry_seconds: float = Field(default=600.0, ge=0)  # length of an outage after which the run stops
    max_requests: PositiveInt = 16  # concurrent requests of a process
    cache_dir: Path | None = None  # folder on the local disk of each node, for data read from remote shards
    cache_gb: float | None = Field(default=None, gt=0)  # size of the cache, never exceeded

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if (self.cache_dir is None) != (self.cache_gb is None):
            raise ValueError(
                "cache_dir and cache_gb belong together: give a folder and its maximum size in gigabytes"
            )
        return self

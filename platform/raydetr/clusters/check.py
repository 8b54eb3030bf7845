"""Read a cluster file and list its problems: `raydetr cluster check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydetr.clusters import kuberay, ray_up
from raydetr.clusters.fields import join
from raydetr.clusters.nodes import Nodes, notices_of, problems_of
from raydetr.config import ConfigError, RunConfig, nearest
from raydetr.user_files import parse_yaml_documents, read_text

TO_FILL_IN = "FILL-IN"


@dataclass(frozen=True)
class Report:
    """What the check of a file found; a cluster starts, and the run fits on it, if there are no problems."""

    file: Path
    problems: tuple[str, ...]
    notices: tuple[str, ...]
    nodes: tuple[Nodes, ...]

    def to_text(self) -> str:
        """Return the report as lines: problems, notices, and a summary."""
        lines = [*self.problems, *(f"notice: {notice}" for notice in self.notices)]
        count = len(self.problems)
        summary = f"{count} problem{'s' * (count != 1)}" if count else "no problem"
        nodes = "".join(f"; {each}" for each in self.nodes)
        return "\n".join([*lines, f"{self.file}: {summary}{nodes}"])


def check_file(file: Path, config: RunConfig | None = None) -> Report:
    """Check a cluster file of `ray up`, or a manifest with RayJobs and RayClusters.

    Args:
        file: the file; other objects of a manifest are ignored.
        config: what is to be trained on the cluster; default: what the entrypoint of a RayJob trains.

    Raises:
        ValueError: the file cannot be read, is not YAML, or is no cluster file.
    """
    documents = _read(file)
    notices = [
        f"{path}: {word} is to be filled in"
        for document in documents
        for path, text in _texts(document, _prefix(document))
        for word in text.split()
        if TO_FILL_IN in word
    ]
    if len(documents) == 1 and "provider" in documents[0]:
        found = [ray_up.check(documents[0])]
        configs = [config]
    else:
        documents = _manifests(documents, file)
        found = [kuberay.check(each) for each in documents]
        configs = [config for _ in documents]
    problems: list[str] = []
    nodes = []
    for document, (lines, described), chosen in zip(documents, found, configs, strict=True):
        problems += lines
        if chosen is None and "kind" in document:
            try:
                chosen = kuberay.job_config(document)
            except ConfigError as error:
                problems.append(str(error))
        if described is not None:
            nodes.append(described)
            if chosen is not None:
                problems += problems_of(chosen, described)
                notices += notices_of(chosen, described)
    return Report(file, tuple(problems), tuple(notices), tuple(nodes))


def _read(file: Path) -> list[Mapping[str, Any]]:
    try:
        documents = parse_yaml_documents(read_text(file))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file}: is not YAML that is unambiguous: {error}") from None
    documents = [document for document in documents if document is not None]
    if not documents or not all(isinstance(document, Mapping) for document in documents):
        raise ValueError(f"{file}: {_NO_CLUSTER_FILE}")
    try:
        list(_texts(documents, ""))
    except RecursionError:
        raise ValueError(f"{file}: an alias (*) is inside of what it stands for") from None
    return documents


_NO_CLUSTER_FILE = (
    "is no cluster file: one for `ray up` has a `provider`, and a KubeRay manifest has `apiVersion: "
    f"{kuberay.API_VERSION}` and `kind: RayJob` or `RayCluster`"
)


def _manifests(documents: list[Mapping[str, Any]], file: Path) -> list[Mapping[str, Any]]:
    """Return the RayJobs and RayClusters among the objects of a manifest.

    Raises:
        ValueError: there is none, or one of another kind or version of KubeRay.
    """
    of_ray = [each for each in documents if str(each.get("apiVersion", "")).startswith("ray.io/")]
    for each in of_ray:
        kind, version = str(each.get("kind")), each["apiVersion"]
        if version != kuberay.API_VERSION:
            raise ValueError(f"{file}: apiVersion: {version} is not {kuberay.API_VERSION}")
        if kind not in kuberay.KINDS:
            hint = nearest(kind, kuberay.KINDS)
            raise ValueError(f"{file}: kind: {kind} is neither {' nor '.join(kuberay.KINDS)}{hint}")
    if not of_ray:
        raise ValueError(f"{file}: {_NO_CLUSTER_FILE}")
    return of_ray


def _prefix(document: Mapping[str, Any]) -> str:
    """Return the kind of an object of a manifest that is not Ray's, with which its paths begin."""
    kind = str(document.get("kind", ""))
    return "" if kind in kuberay.KINDS else kind


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the texts in a value, each with its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _texts(below, join(path, key))
    elif isinstance(value, list):
        for place, below in enumerate(value):
            yield from _texts(below, f"{path}[{place}]")

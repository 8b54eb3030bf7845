"""Feed an MLflow run from a training process, through a thread, so that training never waits for a server."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from raydetr.tracking.mlflow_run import TrackingError, connect, first_line, metric_name, store_file

log = logging.getLogger(__name__)

METRICS_PER_BATCH = 1000  # MLflow's limit


class Tracker:
    """Feeds one run from a training process. No call waits for MLflow, except `flush` and `close`.

    Values and files go into a buffer in memory; a thread sends it every few seconds. What could not be sent
    stays in the buffer and is tried again; sending a value twice is harmless, since it carries its timestamp.
    """

    def __init__(self, uri: str, run_id: str, *, interval_s: float = 3.0) -> None:
        self.uri = uri
        self.run_id = run_id
        self._interval_s = interval_s
        self._metrics: list[Metric] = []
        self._files: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._hurry = False
        self._closed = False
        self._num_failures = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step. Values that are not finite are kept as they are."""
        now = int(time.time() * 1000)
        rows = [Metric(metric_name(name), float(value), now, step) for name, value in values.items()]
        with self._changed:
            assert not self._closed, "the tracker is closed"
            self._metrics += rows

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a (small) file as it is now."""
        self.content(path.read_bytes(), str(PurePosixPath(folder) / path.name))

    def text(self, text: str, file: str) -> None:
        """Keep a text as the artifact `file`."""
        self.content(text.encode(), file)

    def figure(self, figure: Figure, file: str) -> None:
        """Keep a matplotlib figure as the artifact `file` (PNG)."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self.content(buffer.getvalue(), file)

    def image(self, image: Image.Image, file: str) -> None:
        """Keep a picture as the artifact `file` (PNG)."""
        buffer = io.BytesIO()
        image.save(buffer, format="png")
        self.content(buffer.getvalue(), file)

    def content(self, content: bytes, file: str) -> None:
        """Keep bytes as the artifact `file`, a path within the run's artifacts; a later one replaces it."""
        with self._changed:
            assert not self._closed, "the tracker is closed"
            # an older one of the same name that has not been sent yet would only be overwritten
            self._files = [entry for entry in self._files if entry[0] != file] + [(file, content)]

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until everything recorded so far is stored.

        Raises:
            TrackingError: sending failed, or did not end in time; what is unsent stays in the buffer.
        """
        with self._changed:
            failures = self._num_failures
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_empty() or self._num_failures > failures, timeout_s)
            if not self._is_empty():
                raise TrackingError(self._complaint(timeout_s)) from self._error

    def close(self, timeout_s: float = 60.0) -> None:
        """Flush, then end the thread.

        Raises:
            TrackingError: as `flush`; the thread ends all the same.
        """
        try:
            self.flush(timeout_s)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            # a request in flight is not waited for: the thread is a daemon and cannot hold the process
            self._thread.join(timeout=1.0)

    def _is_empty(self) -> bool:
        return not self._metrics and not self._files

    def _complaint(self, timeout_s: float) -> str:
        why = first_line(self._error) if self._error else f"no answer within {timeout_s:g} s"
        unsent = f"{len(self._metrics)} metric values and {len(self._files)} files"
        return f"{unsent} of run {self.run_id} did not reach MLflow at {self.uri}: {why}"

    def _run(self) -> None:
        client = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._hurry or self._closed, self._interval_s)
                if self._closed:
                    return
                self._hurry = False
            try:
                client = client or connect(self.uri)
                self._send_metrics(client)
                self._send_files(client)
                self._report(None)
            except Exception as error:  # whatever it is, it must not end the thread: `flush` raises it
                self._report(error)

    def _send_metrics(self, client: MlflowClient) -> None:
        while batch := self._metrics[:METRICS_PER_BATCH]:
            client.log_batch(self.run_id, metrics=batch)
            with self._changed:
                del self._metrics[: len(batch)]

    def _send_files(self, client: MlflowClient) -> None:
        while self._files:
            entry = self._files[0]
            store_file(client, self.run_id, *entry)
            with self._changed:
                self._files = [other for other in self._files if other is not entry]

    def _report(self, error: Exception | None) -> None:
        with self._changed:
            if error and not self._error:
                log.warning("MLflow at %s: %s; will be tried again", self.uri, first_line(error))
            self._error = error
            self._num_failures += error is not None
            self._changed.notify_all()

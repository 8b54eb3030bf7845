"""Log to an MLflow run from a training process, through a thread: training does not wait for the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mlflow import MlflowClient
from mlflow.entities import Metric

from raydetr.tracking.mlflow_run import TrackingError, connect, first_line, metric_name, store_file

METRICS_PER_BATCH = 1000  # MLflow's limit


class Tracker:
    """Logs to one run. No call waits for MLflow, except `flush` and `close`.

    Values and files go into a buffer in memory, which a thread sends every `interval_s` seconds. If sending fails, they
    stay in the buffer and are sent again. A value can be sent twice: MLflow ignores a point that it already has
    (same key, step, timestamp and value).
    """

    def __init__(self, uri: str, run_id: str, *, interval_s: float = 3.0) -> None:
        self.uri = uri
        self.run_id = run_id
        self._interval_s = interval_s
        self._metrics: list[Metric] = []
        self._files: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._flush_requested = False
        self._closed = False
        self._num_failures = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """What keeps values from MLflow at the moment; None if nothing does."""
        error = self._error
        return None if error is None else f"MLflow at {self.uri}: {first_line(error)}; will retry"

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step. Values need not be finite."""
        now = int(time.time() * 1000)
        rows = [Metric(metric_name(name), float(value), now, step) for name, value in values.items()]
        with self._changed:
            assert not self._closed, "the tracker is closed"
            self._metrics += rows

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Store a copy of a (small) file in `folder`, with its current content.

        Raises:
            OSError: the file cannot be read.
        """
        self.log_bytes(path.read_bytes(), str(PurePosixPath(folder) / path.name))

    def log_text(self, text: str, file: str) -> None:
        """Store a text as the artifact `file`."""
        self.log_bytes(text.encode(), file)

    def log_bytes(self, content: bytes, file: str) -> None:
        """Store bytes as the artifact `file`, a path within the run's artifacts; a later call replaces it."""
        with self._changed:
            assert not self._closed, "the tracker is closed"
            # An older version that has not been sent yet would only be overwritten
            self._files = [entry for entry in self._files if entry[0] != file] + [(file, content)]

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until everything that was logged so far is stored.

        Raises:
            TrackingError: sending failed, or took longer than `timeout_s`; the buffer keeps what was not sent.
        """
        with self._changed:
            failures = self._num_failures
            self._flush_requested = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_empty() or self._num_failures > failures, timeout_s)
            if not self._is_empty():
                raise TrackingError(self._error_message(timeout_s)) from self._error

    def close(self, timeout_s: float = 60.0) -> None:
        """Flush, then end the thread.

        Raises:
            TrackingError: see `flush`; the thread ends anyway.
        """
        try:
            self.flush(timeout_s)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            # Do not wait for a request in flight: the thread is a daemon and does not keep the process alive
            self._thread.join(timeout=1.0)

    def _is_empty(self) -> bool:
        return not self._metrics and not self._files

    def _error_message(self, timeout_s: float) -> str:
        reason = first_line(self._error) if self._error else f"no answer within {timeout_s:g} s"
        unsent = f"{len(self._metrics)} metric values and {len(self._files)} files"
        return f"{unsent} of run {self.run_id} did not reach MLflow at {self.uri}: {reason}"

    def _run(self) -> None:
        client = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._flush_requested or self._closed, self._interval_s)
                if self._closed:
                    return
                self._flush_requested = False
            try:
                client = client or connect(self.uri)
                self._send_metrics(client)
                self._send_files(client)
                self._report(None)
            except Exception as error:  # no error may end the thread: `flush` raises it
                self._report(error)

    def _send_metrics(self, client: MlflowClient) -> None:
        while batch := self._metrics[:METRICS_PER_BATCH]:
            client.log_batch(self.run_id, metrics=batch)
            # Removed only after MLflow has them. Other threads only append, so the first ones are still these.
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
            self._error = error
            self._num_failures += error is not None
            self._changed.notify_all()

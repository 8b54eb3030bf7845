"""Stop runs that no retry can help. Ray Train's controller imports this, so it loads no models and no MLflow."""

from __future__ import annotations

from typing import Any

import ray.train

# Errors that the same input raises again: bad data or settings, too many steps that are not finite, bugs
FINAL = (ValueError, FloatingPointError, AssertionError)


class FinalError(RuntimeError):
    """A worker failed with an error that no retry can help; the message is the worker's."""


class StopAtFinalErrors(ray.train.UserCallback):
    """Ends a run at once where Ray Train would restart all workers, only for the same error to be raised again.

    Ray Train's controller calls it before it decides about a retry, and retries no error of a callback. Workers
    that wait for the failed one are ended by the controller.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Check what the workers raised.

        Raises:
            FinalError: a retry cannot help.
        """
        for rank, error in sorted(worker_exceptions.items()):
            if isinstance(error, FINAL):
                raise FinalError(f"worker {rank}: {error}")

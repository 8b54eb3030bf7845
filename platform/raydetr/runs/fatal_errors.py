"""Stop a run at a fatal error, without a retry.

Ray Train's controller imports this module, so it loads neither models nor MLflow.
"""

from __future__ import annotations

import errno
from typing import Any

import ray.train

# Errors that a retry would raise again: invalid data or settings, too many skipped steps, bugs
FATAL = (ValueError, FloatingPointError, AssertionError)


class FatalError(RuntimeError):
    """A worker failed with an error that a retry would raise again; the message is the worker's."""


class StopAtFatalErrors(ray.train.UserCallback):
    """Ends a run at a fatal error, at which Ray Train would restart all workers.

    Ray Train's controller calls it before it decides about a retry, and does not retry after an error of a callback.
    The controller ends the workers that wait for the failed one.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Check the errors of the workers.

        Raises:
            FatalError: one of them is fatal.
        """
        for rank, error in sorted(worker_exceptions.items()):
            if is_fatal(error):
                raise FatalError(f"worker {rank}: {error}")


def is_fatal(error: Exception) -> bool:
    """Return whether a retry would raise an error again; an error's own `is_fatal` decides, if it has one."""
    # A disk or a file server that failed to read a sample may work again
    by_type = isinstance(error, FATAL) and getattr(error, "errno", None) != errno.EIO
    return bool(getattr(error, "is_fatal", by_type))

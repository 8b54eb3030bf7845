"""Search hyperparameters: `raydetr tune` as a job to submit to a cluster.

ray job submit --working-dir . -- python jobs/tune_detector.py RECIPE --space FILE [PATH=VALUE]...
"""

from __future__ import annotations

import sys

from _sources import add_sources

add_sources()

from raydetr.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.argv[1:1] = ["tune"]
    main()

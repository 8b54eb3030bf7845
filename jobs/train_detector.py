"""Train a detector: `raydetr train` as a job to submit to a cluster.

ray job submit --working-dir . -- python jobs/train_detector.py RECIPE [PATH=VALUE]...
"""

from __future__ import annotations

import sys

from _sources import add_sources

add_sources()

from raydetr.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()

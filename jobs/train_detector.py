"""Train a detector: `raydetr train` as a job to submit to a cluster.

ray job submit --working-dir . -- python jobs/train_detector.py RECIPE [PATH=VALUE]... [--name NAME]

With a name, the run goes on if the job is submitted again.
"""

from __future__ import annotations

import sys

from _sources import add_sources

add_sources()

from raydetr.cli.main import main  # noqa: E402
from raydetr.locations import in_ray_job  # noqa: E402

if __name__ == "__main__":
    is_named = any(argument.partition("=")[0] == "--name" for argument in sys.argv)
    sys.argv[1:1] = ["train", "--or-resume"] if in_ray_job() and is_named else ["train"]
    main()

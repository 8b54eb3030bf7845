"""From data sets of several kinds to shards on disk, and whether they are still what was written."""

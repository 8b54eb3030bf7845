"""Turn shards into batches (see docs/data/)."""

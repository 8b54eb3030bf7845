"""Read shards from a server: byte ranges, prefetching, and a cache on each node."""

"""Shards on a server: byte ranges, prefetching, a cache on each node."""

"""Shards on a server: byte ranges, retries, and a cache of each node."""

"""Read shards from a server: byte ranges, and what the processes of a node share on its disk."""

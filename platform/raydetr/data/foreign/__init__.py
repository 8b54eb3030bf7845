"""Shards that others wrote, indexed so that they can be read as they are."""

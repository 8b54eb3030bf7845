"""Shards that other programs wrote."""

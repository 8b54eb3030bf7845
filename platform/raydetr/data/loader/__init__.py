"""Loader processes, and how their batches reach the trainer."""

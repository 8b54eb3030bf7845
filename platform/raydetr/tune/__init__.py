"""Searching hyper-parameters: what may vary, and trials that are Ray Train runs."""

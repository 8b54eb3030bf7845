"""What a run keeps for people: tables, curves, pictures."""

from __future__ import annotations
def log_evaluation(*a): pass
def log_final(*a): pass

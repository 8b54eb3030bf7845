"""Examine data and machines before time is spent on training."""

"""Provide the command line `raydetr`."""

"""The command line `raydetr`."""

"""The life of a run: start, train on Ray or locally, resume, evaluate, compare."""

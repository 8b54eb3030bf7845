"""Search hyperparameters: the search space, and trials that are Ray Train runs."""

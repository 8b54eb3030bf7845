"""Training: the loop (free of Ray), what a checkpoint holds, and the launch on Ray Train."""

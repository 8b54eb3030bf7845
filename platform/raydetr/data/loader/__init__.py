"""Load batches in other processes and hand them to the trainer."""

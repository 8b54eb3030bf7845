"""What lies on disk: WebDataset shards, their index and manifest; writing, reading, verifying them."""

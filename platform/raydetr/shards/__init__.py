"""WebDataset shards with their index and manifest: write, read, verify and cache them."""

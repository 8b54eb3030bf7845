"""Index and read WebDataset shards that other programs wrote."""

"""Data: COCO in, WebDataset shards on disk, batches out (see docs/data.md)."""

"""Evaluate detectors: COCO results, ground truth, average precision."""

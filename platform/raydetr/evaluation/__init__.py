"""Evaluation: detections to COCO results, average precision."""

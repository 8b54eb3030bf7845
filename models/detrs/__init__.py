"""Models of the DETR family: torch only, usable without the training platform."""

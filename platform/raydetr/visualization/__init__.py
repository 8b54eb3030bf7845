"""Draw images with boxes, and plots. Imports nothing else of raydetr."""

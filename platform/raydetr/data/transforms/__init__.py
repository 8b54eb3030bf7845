"""Transform an image and its boxes before they are batched."""

"""What is done to an image and its boxes before they are batched."""

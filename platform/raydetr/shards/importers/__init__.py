"""Data sets in other formats, as COCO records."""

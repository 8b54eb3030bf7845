"""Import data sets in other formats as COCO records."""

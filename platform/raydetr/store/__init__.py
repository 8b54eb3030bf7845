"""Files in a folder or at a URL."""

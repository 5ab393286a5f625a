"""Web demo: captioning, classification and search."""

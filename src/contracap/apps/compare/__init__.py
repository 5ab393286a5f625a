"""Two systems side by side: gaps between their figures, with intervals and tests, as a figure, a page and tables."""

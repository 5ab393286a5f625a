"""Captions and embeddings of many pictures."""

"""Captions and embeddings for many pictures: from folders, lists and tar shards into files."""

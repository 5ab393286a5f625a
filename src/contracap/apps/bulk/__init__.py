"""Captions and embeddings for many images: from folders, lists and tar shards into files."""

"""What a run came to, on one self-contained page."""

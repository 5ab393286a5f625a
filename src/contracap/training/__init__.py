"""Training: parameter groups, one update, repetition, checkpoints, records."""

"""Evaluators: objects with one shape, whose `run(model)` yields the name and the value of each figure."""

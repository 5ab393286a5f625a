"""Evaluators: functions of a model that return a `Result`."""

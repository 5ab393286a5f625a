"""The cost of a run on paper: arithmetic, memory, time and traffic, before any of it is paid for."""

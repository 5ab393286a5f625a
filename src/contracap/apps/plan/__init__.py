"""What a run costs, on paper: arithmetic, memory, time and traffic, before any of it is paid for."""

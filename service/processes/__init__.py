"""Server processes: start, fork, signals, end."""

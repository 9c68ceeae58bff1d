"""What a compilation would do and what it could gain, from sizes alone: nothing is read or run."""

"""What everything rests on: errors, files, the terminal, signals, random numbers."""

"""Data sets: where images come from, how they are stored as .beton files, how they are read."""

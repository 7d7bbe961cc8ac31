"""C++ of our own for CPUs, compiled on the machine that runs it."""

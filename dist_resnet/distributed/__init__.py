"""Ranks: the process group, the exchange buffer, the sums over replicas."""

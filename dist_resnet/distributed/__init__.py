"""Ranks: the process group, the exchange buffer, sums over replicas."""

"""Measure the trainer beside what else could be used, and against what the machine can do.

`python -m dist_resnet.bench --help` says how. Candidates take turns, so that whatever slows the
machine for a while slows all of them, and are compared by ratios of the same round.
"""

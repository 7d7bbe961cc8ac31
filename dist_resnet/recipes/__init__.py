"""What recipes reach, kept as one small file a run, and the tables and curves made of those."""

"""Where figures go: the console, metrics.jsonl and W&B, behind one small protocol; rank 0 only."""

"""Where figures go while a run lasts: the console, metrics.jsonl and W&B; on rank 0 only."""

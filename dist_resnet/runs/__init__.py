"""What a run leaves on disk and reads back: its folder, checkpoints, summary."""

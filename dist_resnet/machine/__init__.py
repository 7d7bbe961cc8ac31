"""What a run finds: devices, memory, versions."""

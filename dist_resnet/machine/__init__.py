"""What a run finds: devices, cores, memory, versions of libraries."""

"""What writes this repository's own pages; no part of what is installed."""

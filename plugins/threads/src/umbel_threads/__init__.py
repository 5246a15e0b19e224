"""Thread pool of Umbel."""

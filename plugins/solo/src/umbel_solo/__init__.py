"""Main-thread pool of Umbel: one task at a time, for debugging."""

"""Pool of Umbel for eventlet: many greenlets at once in each child process."""

"""Pool of Umbel for gevent: many greenlets at once in each child process."""

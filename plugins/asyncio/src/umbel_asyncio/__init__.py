"""Pool of Umbel for coroutines: thousands at once on the event loop of each child."""

"""The worker: claims deliveries, has them run by a pool, and settles each exactly once."""

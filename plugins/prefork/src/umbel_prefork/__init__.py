"""Process pool of Umbel: one job at a time in each child."""

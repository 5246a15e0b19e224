"""Schedules: what is due when (pure), the clockwork that sends it, and how entries are made and changed."""

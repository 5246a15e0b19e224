"""Embedded SQLite transport and result store of Umbel."""

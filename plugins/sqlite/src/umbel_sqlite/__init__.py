"""Embedded SQLite transport and result store of Umbel: one file, no server, any number of processes on one host."""

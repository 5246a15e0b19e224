"""Zstandard compressor of Umbel."""

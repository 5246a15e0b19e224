"""Brotli compressor of Umbel."""

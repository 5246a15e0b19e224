"""zlib compressor of Umbel."""

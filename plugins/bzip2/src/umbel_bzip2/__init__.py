"""bzip2 compressor of Umbel."""

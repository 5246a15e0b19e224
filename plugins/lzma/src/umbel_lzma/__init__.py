"""xz compressor of Umbel."""

"""Pickle serializer of Umbel, refused unless accepted by name."""

"""YAML serializer of Umbel, safe tags only."""

"""MessagePack serializer of Umbel."""

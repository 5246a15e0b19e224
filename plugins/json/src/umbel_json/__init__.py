"""JSON serializer of Umbel, with the wire's extension forms."""

"""An exception class that clients and workers in Python both have."""


class Boom(Exception):
    """Raised by tasks."""

"""Liveness and readiness of a worker over plain HTTP: a listener."""

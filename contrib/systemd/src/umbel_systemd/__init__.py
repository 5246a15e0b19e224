"""The notifications of systemd: a listener."""

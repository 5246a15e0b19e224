"""Process pool of Umbel: a clean fork server, one socket pair per child."""

"""The ports: what a driver must do. One file each; a plugin imports these, ``umbel.model``, ``errors``, ``markers``."""

"""Finding plugins (``loader``), letting them take part (``manager``), and telling of them (``inventory``)."""

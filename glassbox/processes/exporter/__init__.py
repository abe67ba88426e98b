"""The exporter process of a server, which a worker starts: what it writes to, and when."""

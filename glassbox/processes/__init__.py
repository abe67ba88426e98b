"""What runs where: in a worker, in an API server, in the exporter, and offline."""

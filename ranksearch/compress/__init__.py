"""A network's layers: found, profiled, replaced by their factors, and the network taken home."""

"""Finds a network's layers, profiles and factorizes them, and exports the network."""

"""Helpers for every other part: nested batches, atomic file writes, seeded random numbers."""

"""Runs one study from its file to its report: the steps, the folder, the storage."""

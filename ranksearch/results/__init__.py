"""What a study finds, and choosing from it: no torch, so that reports and tools read it in a moment."""

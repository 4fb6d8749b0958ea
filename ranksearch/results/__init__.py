"""The results of a study, and how to choose from them; without torch, so that reports and tools load them quickly."""

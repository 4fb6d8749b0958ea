"""Models that a study can name, as `model = "ranksearch.models:lenet"`; a user's own enter by the same door."""

from ranksearch.models.lenet import lenet

__all__ = ["lenet"]

"""Names of scores."""

ACCURACY = "accuracy"
AGREEMENT = "agreement with the dense net"
EXPLAINED = "explained variance of the dense net's outputs"
DELTA = "delta < 1.25"


def is_percent(name: str) -> bool:
    """Whether scores of this name are shown as per cent; all others are shown with four decimals."""
    return name in (ACCURACY, AGREEMENT, DELTA)

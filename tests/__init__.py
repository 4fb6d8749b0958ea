"""The tests, in folders as the package has them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]

"""A module whose import fails, for study files in tests."""

raise NameError("of a user's own module")

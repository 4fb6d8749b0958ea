"""A module that cannot be imported; study files name it."""

raise NameError("of a user's own module")

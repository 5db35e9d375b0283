"""The one exception that is meant for a user's eyes."""


class UserError(Exception):
    """Something a user can mend. Its text is one line that names the thing, the value and the way out; it is printed without a trace."""

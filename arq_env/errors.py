"""The one exception whose message is meant for the user, in one sentence."""


class ArqError(ValueError):
    """Something the user can put right; scripts print the message alone and exit with code 2."""

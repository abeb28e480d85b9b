"""Exit codes of every script, and the errors that end one.

Schedulers act on the codes: a refusal must not be retried, an interruption should be. Any other
failure is 1: its cause is outside, such as a full disk.
"""

DONE, FAILED, BAD_INPUT, REFUSED, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 4, 75


class ConfigError(Exception):
    """A setting or an input that cannot work; says what to do. Exit code 2."""


class RefusedError(Exception):
    """Parts that do not fit together, such as a student and another model's dump. Exit code 3."""


class FailedError(Exception):
    """Something outside stopped the work; another attempt may succeed. Exit code 1."""


class Interrupted(Exception):
    """Stopped by a signal with everything committed; the same command resumes. Exit code 75."""

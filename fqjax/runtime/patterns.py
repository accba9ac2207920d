"""Regular expressions that a user or a file gives."""

import re
import warnings

from fqjax.runtime.errors import InputError


def compile_pattern(pattern: str, what: str) -> re.Pattern[str]:
    """The compiled expression; what Python only warns of is passed over.

    Args:
      pattern: the expression.
      what: names it in the message.

    Raises:
      InputError: if it is no regular expression, or one that is nested or repeated beyond what Python compiles.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{what}: not a regular expression ({error})") from None

"""The error for input that is at fault, rather than the program."""


class InputError(ValueError):
    """Bad input.  The message is one line that names the file, tensor, layer or option and says what was expected."""


class TooLong(InputError):
    """More tokens than the model has positions, or a request may have."""

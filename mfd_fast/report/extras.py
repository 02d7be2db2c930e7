"""The error for a missing extra."""


def missing_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise from ``error`` when a library of the ``report`` extra is not installed."""
    message = f'pictures and reports need {error.name}, which is not installed: pip install "mfd_fast[report]"'
    return ModuleNotFoundError(message, name=error.name)

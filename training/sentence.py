"""What went wrong, on one line, and the exit status that goes with it."""

from training.memory import OutOfMemory, out_of_memory

CALL_WAS_WRONG = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


def sentence(error: Exception) -> str:
    """What went wrong, on one line; the kind of error leads where its text alone says little."""
    text = " ".join(str(error).split())
    if out_of_memory(error) and not isinstance(error, OutOfMemory):
        return f"out of memory ({text[:200]}); take fewer or smaller images at once, or --device cpu"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if type(error).__module__ == "builtins" and not isinstance(error, (*CALL_WAS_WRONG, OSError)):
        return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"
    return text or f"{type(error).__name__} (run again with --debug for the traceback)"


def status(error: Exception) -> int:
    """2 where the call was wrong, 1 where the work failed."""
    return 2 if isinstance(error, CALL_WAS_WRONG) else 1

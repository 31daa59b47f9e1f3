"""Out of memory, as one sentence with the flag that asks for less."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
"""In torch's, CUDA's, MPS's and Ray's messages, in small letters."""
OR_ELSEWHERE = ", in another --out if this one has shards or steps already"


class OutOfMemory(Exception):
    """The machine or the device had no memory left for so much at once."""


@contextmanager
def asking_for_less(flag: str, tried: int, *, free: bool = False) -> Iterator[None]:
    """Turn whatever out-of-memory error comes from within, here or on a worker, into one sentence.

    Args:
        flag: The option of which a smaller value needs less memory.
        tried: Its value, or what stood for it.
        free: Whether its value changes no result, so that the same folder goes on with another.

    Raises:
        OutOfMemory: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        if tried > 1:
            where = ", which changes no result" if free else OR_ELSEWHERE
            advice = f"run the same command with {flag} {tried // 2}{where}"
        else:
            advice = "take a smaller model or smaller images, or a machine with more memory"
        images = "image" if tried == 1 else "images"
        raise OutOfMemory(f"out of memory with {tried} {images} at once; {advice}") from error


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: by the kind of the error or of what caused it, and else by torch's or Ray's words."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        theirs = type(error) is RuntimeError or type(error).__module__.startswith("ray")
        if theirs and any(words in str(error).lower() for words in SAID):
            return True
        error = error.__cause__
    return False

"""Whoever runs out of memory is told, in one sentence, which flag asks for less."""

import errno

import numpy as np
import pytest
import torch

from training.memory import OutOfMemory, asking_for_less, out_of_memory

TOO_MUCH = 1 << 60


def raised(call) -> Exception:
    """What a call really raises here."""
    with pytest.raises(Exception) as error:
        call()
    return error.value


def caused() -> None:
    try:
        np.empty(TOO_MUCH, np.uint8)
    except MemoryError as error:
        raise ValueError("3 shards failed") from error


RAN_OUT = {
    "numpy": lambda: np.empty(TOO_MUCH, np.uint8),
    "torch on a CPU": lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
    "what it caused": caused,
}


@pytest.mark.parametrize("kind", RAN_OUT)
def test_every_kind_becomes_one_sentence_with_half_of_what_was_tried(kind):
    with pytest.raises(OutOfMemory) as told, asking_for_less("--batch-size", 64):
        RAN_OUT[kind]()

    advice = "in another --out if this one has shards or steps already"
    assert (
        str(told.value) == f"out of memory with 64 images at once; run the same command with --batch-size 32, {advice}"
    )


def test_the_kinds_that_this_machine_cannot_raise_are_known_by_name_and_number():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as told, asking_for_less("--batch-size", 64):
        raise error

    assert told.value is error


def test_one_image_has_no_half_and_a_free_flag_says_that_it_changes_nothing():
    with pytest.raises(OutOfMemory, match=r"with 1 image at once; take a smaller model"), asking_for_less("--b", 1):
        raise MemoryError
    free = asking_for_less("--micro-batch", 5, free=True)
    with pytest.raises(OutOfMemory, match=r"--micro-batch 2, which changes no result$"), free:
        raise MemoryError

"""Id arithmetic over the one vocabulary, on NumPy arrays.

Tokenizers speak local ids (counted from 0 each); the model speaks global ids.  Knows no files, no
templates and no tensors.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.vocab import VocabConfig


def text_to_global(text_local: ArrayLike, vocab: VocabConfig) -> NDArray[np.int64]:
    """SentencePiece ids -> global ids, any shape.

    Raises:
        DataError: an id outside ``0..num_text_ids - 1``.
    """
    ids = _checked(text_local, vocab.num_text_ids, "text id")
    return ids + vocab.first_text_id


def image_to_global(codes_local: ArrayLike, vocab: VocabConfig) -> NDArray[np.int64]:
    """Image codes -> global ids (the same numbers), any shape.

    Raises:
        DataError: a code outside ``0..num_image_codes - 1``.
    """
    return _checked(codes_local, vocab.num_image_codes, "image code")


def text_to_local(ids: ArrayLike, vocab: VocabConfig) -> NDArray[np.int64]:
    """Global text ids -> SentencePiece ids.

    Raises:
        DataError: an id that is no text id.
    """
    local = np.asarray(ids, dtype=np.int64) - vocab.first_text_id
    return _checked(local, vocab.num_text_ids, "text id")


def image_to_local(ids: ArrayLike, vocab: VocabConfig) -> NDArray[np.int64]:
    """Global image ids -> image codes.

    Raises:
        DataError: an id that is no image code.
    """
    return _checked(ids, vocab.num_image_codes, "image code")


def is_image(ids: ArrayLike, vocab: VocabConfig) -> NDArray[np.bool_]:
    """Where an id is an image code; same shape as ``ids``."""
    array = np.asarray(ids)
    return (array >= 0) & (array < vocab.num_image_codes)


def is_text(ids: ArrayLike, vocab: VocabConfig) -> NDArray[np.bool_]:
    """Where an id is a text piece (commands are not); same shape as ``ids``."""
    array = np.asarray(ids)
    return (array >= vocab.first_text_id) & (array < vocab.first_command_id)


def is_command(ids: ArrayLike, vocab: VocabConfig) -> NDArray[np.bool_]:
    """Where an id is one of the 27 command tokens; same shape as ``ids``."""
    array = np.asarray(ids)
    return (array >= vocab.first_command_id) & (array < vocab.size)


def _checked(values: ArrayLike, limit: int, what: str) -> NDArray[np.int64]:
    array = np.asarray(values, dtype=np.int64)
    if array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            raise DataError(
                f"{what} {wrong}: the vocabulary has 0..{limit - 1}; "
                f"the tokenizer does not belong to this model"
            )
    return array

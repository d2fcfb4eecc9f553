"""The one vocabulary of text and image tokens (paper 2.3; ranges as in the released code).

Ids are laid out as ``[image codes | text pieces | 27 command tokens | padding rows]``.  The padding
fills the table up to a fixed multiple, so that its size does not depend on the tensor-parallel
size and a checkpoint fits every layout.
"""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse

PADDING_MULTIPLE = 1024

COMMAND_TOKENS = (
    "[PAD]",
    "[BOI1]",
    "[BOI2]",
    "[BOI3]",
    "[EOI1]",
    "[EOI2]",
    "[EOI3]",
    "[ROI1]",
    "[ROI2]",
    "[ROI3]",
    "[SEP]",
    "[MASK]",
    "[CLS]",
    "[ENC]",
    "[TINY]",
    "[SMALL]",
    "[BASE]",
    "[BIG]",
    *(f"[POS{i}]" for i in range(9)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabConfig:
    """Sizes of the three id ranges."""

    num_image_codes: int = 8192
    """Codes of the image tokenizer; they take the first ids."""
    num_text_ids: int = 50_000
    """Ids reserved for text; a text tokenizer may have at most so many pieces."""

    def __post_init__(self) -> None:
        for name in ("num_image_codes", "num_text_ids"):
            value = getattr(self, name)
            # Shards store tokenizer-local ids in 16 bits.
            if not 1 <= value <= 65_536:
                raise refuse(f"model.vocab.{name}", value, "must be in 1..65536 (16-bit ids)")

    @property
    def first_text_id(self) -> int:
        """Offset added to a SentencePiece id."""
        return self.num_image_codes

    @property
    def first_command_id(self) -> int:
        """Id of ``[PAD]``, the first command token."""
        return self.num_image_codes + self.num_text_ids

    @property
    def size(self) -> int:
        """Ids that mean something; 58,219 for the original."""
        return self.first_command_id + len(COMMAND_TOKENS)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding table; 58,368 for the original."""
        return -(-self.size // PADDING_MULTIPLE) * PADDING_MULTIPLE

    def command_id(self, token: str) -> int:
        """Global id of a command token such as ``[ROI1]``."""
        return self.first_command_id + COMMAND_TOKENS.index(token)

"""Shapes of the benchmark: those of the model of 4 billion parameters, and tiny ones."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The defaults are for a GPU."""

    lengths: tuple[int, ...] = (1088, 2560, 4096, 8192, 16384)
    """Tokens of a sequence, for attention."""
    rows: tuple[int, ...] = (8704, 32_768, 65_536)
    """Tokens of a batch, for norms and the junction."""
    batch: int = 4
    """Sequences, up to :attr:`long` tokens each; beyond it one."""
    long: int = 4096
    heads: int = 40
    head_dim: int = 64
    window_block: int = 128
    window_blocks: int = 6
    num_pivots: int = 768
    text_length: int = 64
    vectors: int = 32_768
    codes: int = 8192
    code_dim: int = 256
    gemm_side: int = 8192
    copy_bytes: int = 2**30

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.heads * self.head_dim

    def batch_at(self, length: int) -> int:
        """Sequences of a batch of this length."""
        return self.batch if length <= self.long else 1

    @classmethod
    def micro(cls) -> "Sizes":
        """For a rehearsal on a CPU: three regions, and a length that no block divides."""
        return cls(
            lengths=(72, 256),
            rows=(32,),
            batch=2,
            long=128,
            heads=2,
            head_dim=16,
            window_block=16,
            window_blocks=2,
            num_pivots=32,
            text_length=8,
            vectors=64,
            codes=32,
            code_dim=8,
            gemm_side=64,
            copy_bytes=4096,
        )

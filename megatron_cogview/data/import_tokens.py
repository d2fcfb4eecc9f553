"""Token data of the original CogView to token shards, without tokenising anything again."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.data.encode import Encoded, PairEncoder, check_text
from megatron_cogview.data.pipeline import EncodedPart, check_unchanged, identity
from megatron_cogview.data.raw import Rejected
from megatron_cogview.data.released import CompactBinary, LmdbRows, TokenBatch
from megatron_cogview.data.shards import Records, sample_id
from megatron_cogview.data.token_rows import CODES_PER_SIDE, RowPart, TokenRow
from megatron_cogview.data.tokenize import Advance, Chosen, Work, write_parts

ROWS_PER_STEP = 256


def import_tokens(
    source: CompactBinary | LmdbRows, encoder: PairEncoder, output: Path, work: Work
) -> dict[str, Any] | None:
    """Write shards of rows that are tokens already; give the manifest.

    Args:
        source: the original's data.
        encoder: with the tokenizers that made it; only texts that are still text are encoded.
        output: folder of the shards.
        work: as for tokenisation.

    Raises:
        ConfigError: the sequence has no single grid of 32 x 32 codes.
        DataError: as :func:`tokenize_dataset`.
    """
    if encoder.sequence.codes_per_side != (CODES_PER_SIDE,):
        raise refuse(
            "sequence.codes_per_side",
            encoder.sequence.codes_per_side,
            f"the original's records hold one grid of {CODES_PER_SIDE} codes a side",
        )

    def encode(chosen: Chosen, advance: Advance) -> Generator[EncodedPart]:
        with ThreadPoolExecutor(1, "hash inputs") as hashing:
            for index, part in chosen:
                assert isinstance(part, RowPart)
                before = identity(part)
                digest = hashing.submit(source.digest, part)
                encoded = _encode(source, part, encoder, advance)
                hashed = digest.result()
                check_unchanged(part, before)
                yield EncodedPart(index, part, hashed, encoded)

    return write_parts(source, encoder, output, work, encode)


def _encode(
    source: CompactBinary | LmdbRows, part: RowPart, encoder: PairEncoder, advance: Advance
) -> Encoded:
    encoded = Encoded()
    if isinstance(source, CompactBinary):
        for batch in source.read_batches(part):
            _add_batch(batch, part, encoder, encoded)
            advance(len(batch.usable) * (part.num_bytes // part.num_pairs))
        return encoded
    for rows in _in_steps(source.read(part)):
        _add_rows(rows, encoder, encoded)
        advance(len(rows) * (part.num_bytes // part.num_pairs))
    return encoded


def _in_steps(items: Iterator[TokenRow | Rejected]) -> Iterator[list[TokenRow | Rejected]]:
    step: list[TokenRow | Rejected] = []
    for item in items:
        step.append(item)
        if len(step) == ROWS_PER_STEP:
            yield step
            step = []
    if step:
        yield step


def _add_batch(batch: TokenBatch, part: RowPart, encoder: PairEncoder, encoded: Encoded) -> None:
    """Rows whose texts are ids of one array; the order of rejections is that of the file."""
    lengths = batch.text_length.astype(np.int64)
    budget = encoder.sequence.text_budget
    refused: dict[int, Rejected] = {}
    over = lengths > budget
    if encoder.sequence.text_policy == "truncate":
        encoded.counts.truncated += int(over.sum())
    doubtful = (lengths == 0) | over
    for number in np.flatnonzero(doubtful).tolist():
        ids = batch.text[number, : lengths[number]].tolist()
        answer = check_text(ids, batch.ids[number], part.name, encoder.sequence)
        if isinstance(answer, Rejected):
            refused[number] = answer
    lengths = np.minimum(lengths, budget)
    earlier = iter(batch.rejected)
    place = 0
    for usable in batch.usable:
        if not usable:
            encoded.rejected.append(next(earlier))
            continue
        if place in refused:
            encoded.rejected.append(refused[place])
        place += 1
    kept = np.array([n for n in range(len(batch.ids)) if n not in refused], dtype=np.int64)
    records: Records = np.zeros(len(kept), dtype=encoder.dtype)
    inside = np.arange(batch.text.shape[1]) < lengths[kept, None]
    records["text"] = np.where(inside, batch.text[kept], 0)
    records["text_length"] = lengths[kept]
    records["image0"] = batch.codes[kept]
    records["sample_id"] = [sample_id(batch.ids[n]) for n in kept.tolist()]
    unknown = (batch.text[kept] == encoder.text.unknown_id) & inside
    _add(encoded, records, int(unknown.sum()), encoder)


def _add_rows(rows: list[TokenRow | Rejected], encoder: PairEncoder, encoded: Encoded) -> None:
    """Rows of any kind; those that hold text are tokenised together."""
    texts = [r.text for r in rows if isinstance(r, TokenRow) and isinstance(r.text, str)]
    tokenised = iter(encoder.text.encode_batch(texts))
    kept: list[tuple[TokenRow, list[int]]] = []
    for row in rows:
        if isinstance(row, Rejected):
            encoded.rejected.append(row)
            continue
        ids = next(tokenised) if isinstance(row.text, str) else row.text.tolist()
        checked = check_text(ids, row.id, row.source, encoder.sequence)
        if isinstance(checked, Rejected):
            encoded.rejected.append(checked)
            continue
        encoded.counts.truncated += checked[1]
        kept.append((row, checked[0]))
    records: Records = np.zeros(len(kept), dtype=encoder.dtype)
    unknown = 0
    for record, (row, ids) in zip(records, kept, strict=True):
        record["text"][: len(ids)] = ids
        record["text_length"] = len(ids)
        record["image0"] = row.codes
        record["sample_id"] = sample_id(row.id)
        unknown += ids.count(encoder.text.unknown_id)
    _add(encoded, records, unknown, encoder)


def _add(encoded: Encoded, records: Records, unknown: int, encoder: PairEncoder) -> None:
    highest = int(records["text"].max(initial=0))
    if highest >= encoder.text.vocab_size:
        raise DataError(
            f"text id {highest}: the text tokenizer {encoder.text.path} has "
            f"{encoder.text.vocab_size} pieces; it is not the one the data was made with"
        )
    counts = encoded.counts
    counts.unknown_ids += unknown
    counts.longest_text = max(counts.longest_text, int(records["text_length"].max(initial=0)))
    encoded.records.append(records)

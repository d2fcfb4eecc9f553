"""tokenization.layout and vocab against a naive builder written from the paper's clauses."""

import numpy as np
import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.presets import PRESETS
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.tokenization import vocab as ids_of
from megatron_cogview.tokenization.layout import SequenceLayout

VOCAB = VocabConfig(num_image_codes=50, num_text_ids=30)
SEQUENCES = {
    "text_to_image": SequenceConfig(length=18, text_budget=5, codes_per_side=(3,)),
    "super_resolution": SequenceConfig(
        template="super_resolution", length=30, text_budget=5, codes_per_side=(2, 3)
    ),
    "image_to_text": SequenceConfig(
        template="image_to_text", length=19, text_budget=5, codes_per_side=(3,)
    ),
}


def command(token):
    return VOCAB.command_id(token)


def naive(name, text, *codes):
    """One sequence written out by hand (P-SEQ-1, P-SR-3, P-CAP-1)."""
    words = [50 + t for t in text]
    first = [command("[BASE]"), command("[BOI1]"), *codes[0].ravel(), command("[EOI1]")]
    if name == "text_to_image":
        ids = [command("[ROI1]"), *words, *first]
    elif name == "super_resolution":
        second = [command("[ROI2]"), command("[BASE]"), command("[BOI2]"), *codes[1].ravel()]
        ids = [command("[ROI1]"), *words, *first, *second, command("[EOI2]")]
    else:
        ids = [*first, command("[ROI1]"), *words, command("[SEP]")]
    return ids + [command("[PAD]")] * (SEQUENCES[name].length - len(ids))


def example(name, length, seed=0):
    rng = np.random.default_rng([seed, length])
    grids = [rng.integers(0, 50, (s, s)) for s in SEQUENCES[name].codes_per_side]
    return rng.integers(0, 30, length).tolist(), grids


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("length", range(6))
def test_build_equals_the_naive_builder_and_parse_inverts_it(name, length):
    layout = SequenceLayout(SEQUENCES[name], VOCAB)
    text, grids = example(name, length)
    ids = layout.build(text, *grids)
    assert ids.dtype == np.int64
    assert ids.tolist() == naive(name, text, *grids)
    back_text, back_grids = layout.parse(ids)
    assert back_text == text
    assert all((a == b).all() for a, b in zip(back_grids, grids, strict=True))
    flat = layout.build(text, *(g.ravel() for g in grids))
    assert (flat == ids).all()


@pytest.mark.parametrize("name", SEQUENCES)
def test_build_batch_equals_single_builds_whatever_lies_behind_the_text(name):
    layout = SequenceLayout(SEQUENCES[name], VOCAB)
    rows = [example(name, n % 6, seed=n) for n in range(20)]
    text_NT = np.full((20, 64), 65_535, dtype=np.uint16)
    lengths = np.array([len(t) for t, _ in rows], dtype=np.uint16)
    for row, (text, _) in zip(text_NT, rows, strict=True):
        row[: len(text)] = text
    grids = [np.stack(g).astype(np.uint16) for g in zip(*(g for _, g in rows), strict=True)]
    ids = layout.build_batch(text_NT, lengths, *grids)
    assert ids.tolist() == [layout.build(t, *g).tolist() for t, g in rows]
    assert layout.build_batch(text_NT[:0], lengths[:0], *(g[:0] for g in grids)).shape[0] == 0


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("length", range(6))
def test_positions(name, length):
    layout = SequenceLayout(SEQUENCES[name], VOCAB)
    text, grids = example(name, length)
    ids = layout.build(text, *grids)
    expected, count = [], 0
    for i in ids.tolist():
        count = 0 if i == command("[ROI2]") else count
        expected.append(min(count, layout.sequence.length - 2))
        count += 1
    positions = layout.positions(ids)
    assert positions.tolist() == expected
    assert positions.max() < layout.sequence.model_length
    # Generation sees beginnings of the sequence, training all of it: the same positions.
    for end in range(1, len(ids)):
        assert layout.positions(ids[:end]).tolist() == expected[:end]
    assert layout.positions(np.stack([ids, ids])).tolist() == [expected, expected]


def test_super_resolution_counts_again_from_roi2():
    layout = SequenceLayout(SEQUENCES["super_resolution"], VOCAB)
    ids = layout.build(*_flat(example("super_resolution", 3)))
    at = ids.tolist().index(command("[ROI2]"))
    assert layout.positions(ids)[at - 1 : at + 3].tolist() == [at - 1, 0, 1, 2]


def _flat(pair):
    return pair[0], *pair[1]


@pytest.mark.parametrize("name", SEQUENCES)
def test_loss_weights(name):
    layout = SequenceLayout(SEQUENCES[name], VOCAB)
    labels = layout.build(*_flat(example(name, 3)))[1:]
    weights = layout.loss_weights(labels, 2.0, 0.5)
    assert weights.dtype == np.float32
    for label, weight in zip(labels.tolist(), weights.tolist(), strict=True):
        expected = 0.0 if label == command("[PAD]") else 0.5 if label < 50 else 2.0
        assert weight == expected
    assert layout.sequence.num_image_tokens == int((weights == 0.5).sum())


def test_prompts():
    layout = SequenceLayout(SEQUENCES["text_to_image"], VOCAB)
    text, grids = example("text_to_image", 4)
    ids, count = layout.prompt(text)
    assert (ids == layout.build(text, *grids)[: len(ids)]).all()
    assert ids[-1] == command("[BOI1]")
    assert count == 9

    layout = SequenceLayout(SEQUENCES["super_resolution"], VOCAB)
    text, grids = example("super_resolution", 2)
    ids, count = layout.prompt(text, grids[0])
    assert (ids == layout.build(text, *grids)[: len(ids)]).all()
    assert ids[-1] == command("[BOI2]")
    assert count == 9
    with pytest.raises(DataError, match="takes 1"):
        layout.prompt(text)

    layout = SequenceLayout(SEQUENCES["image_to_text"], VOCAB)
    text, grids = example("image_to_text", 5)
    ids, count = layout.prompt((), *grids)
    assert (ids == layout.build(text, *grids)[: len(ids)]).all()
    assert ids[-1] == command("[ROI1]")
    assert count == 5
    with pytest.raises(DataError, match="generates the text"):
        layout.prompt(text, *grids)


def test_text_region_counts_what_stands_before_the_first_code():
    layout = SequenceLayout(SEQUENCES["text_to_image"], VOCAB)
    for length in range(6):
        text, grids = example("text_to_image", length)
        ids = layout.build(text, *grids)
        assert layout.text_region(ids) == 1 + length + 2
    assert layout.text_region(np.array([[60, 61, 62]])).tolist() == [3]


def test_refusals():
    with pytest.raises(ConfigError, match=r"length = 17.*13 fixed.*text_budget = 5.*18.*at most 4"):
        SequenceLayout(SequenceConfig(length=17, text_budget=5, codes_per_side=(3,)), VOCAB)
    layout = SequenceLayout(SEQUENCES["text_to_image"], VOCAB)
    grid = np.zeros((3, 3), dtype=np.int64)
    for text, codes, words in (
        ([0] * 6, grid, "text of 6 ids: sequence.text_budget = 5"),
        ([30], grid, "text id 30"),
        ([-1], grid, "text id -1"),
        ([0], grid + 50, "image code 50"),
        ([0], grid[:2], "shape"),
    ):
        with pytest.raises(DataError, match=words):
            layout.build(text, codes)
    with pytest.raises(DataError, match="takes 1"):
        layout.build([0], grid, grid)
    with pytest.raises(DataError, match="budget"):
        layout.prompt([0] * 6)


def test_parse_refuses_every_change_of_structure():
    layout = SequenceLayout(SEQUENCES["text_to_image"], VOCAB)
    ids = layout.build(*_flat(example("text_to_image", 3)))
    for at in range(len(ids)):
        damaged = ids.copy()
        damaged[at] = command("[MASK]")
        with pytest.raises(DataError):
            layout.parse(damaged)
    for wrong in (ids[:-1], np.stack([ids, ids]), np.full_like(ids, command("[PAD]"))):
        with pytest.raises(DataError):
            layout.parse(wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_exactly(name):
    run = PRESETS[name]()
    layout = SequenceLayout(run.sequence, run.model.vocab)
    assert layout.fixed_length + run.sequence.text_budget == run.sequence.length
    full = np.zeros(run.sequence.text_budget, dtype=np.int64)
    grid = np.zeros((run.sequence.codes_per_side[0],) * 2, dtype=np.int64)
    ids = layout.build(full, grid)
    assert ids[-1] == run.model.vocab.command_id("[EOI1]")
    assert layout.positions(ids).max() < run.model.max_positions


def test_vocab_ranges_are_disjoint_and_exhaustive():
    ids = np.arange(-1, VOCAB.padded_size)
    masks = np.stack([f(ids, VOCAB) for f in (ids_of.is_image, ids_of.is_text, ids_of.is_command)])
    assert (masks.sum(0) == ((ids >= 0) & (ids < VOCAB.size))).all()
    assert masks.sum(1).tolist() == [50, 30, 27]
    local = np.arange(30).reshape(5, 6)
    assert (ids_of.text_to_local(ids_of.text_to_global(local, VOCAB), VOCAB) == local).all()
    assert (ids_of.image_to_local(ids_of.image_to_global(local, VOCAB), VOCAB) == local).all()
    for wrong in (49, 80):
        with pytest.raises(DataError):
            ids_of.text_to_local([wrong], VOCAB)
    with pytest.raises(DataError):
        ids_of.image_to_local([50], VOCAB)

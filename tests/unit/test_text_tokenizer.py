"""tokenization.text: plain text in, no control ids out; training."""

import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece as spm

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.tokenization.text import TextTokenizer, _all_normal, adopt, normalise, train

CAPTIONS = [
    f"{size} {colour} {shape}"
    for size in ("a large", "a small", "大的", "小的")
    for colour in ("red", "blue", "红色", "蓝色")
    for shape in ("circle", "square", "圆形", "方块")
]
HOSTILE = ["<s>", "</s>", "<unk>", "[BOI1]", "[PAD] [EOI1]", "<0x41>", "▁", "<s>red</s>", "\x00"]
COGVIEW = (
    Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "cogview_sentencepiece"
) / "cog-pretrain.model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train(CAPTIONS, tmp_path_factory.mktemp("text") / "t.model", 330)


def test_normalise():
    assert normalise("  a\r\n\tb\x00\x7f\u2028c　d ") == "a b c d"
    assert normalise("e\u0301") == "é"
    assert normalise("\n\t ") == ""


def test_what_is_taken_for_normal_is_normal():
    """The look at a whole batch may only say yes where nothing would change."""
    pieces = ["a", " ", "  ", "|", "\n", "\u3000", "\u0301", "e", "é", "圆", "\u00a0", "\ud800", ""]
    rng = random.Random(0)
    yes = 0
    for _ in range(4000):
        batch = ["".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(2)]
        if _all_normal(batch):
            yes += 1
            assert [normalise(caption) for caption in batch] == batch
    assert yes > 200
    assert _all_normal(CAPTIONS)


def test_round_trip_of_any_text_through_bytes(tokenizer):
    for caption in [*CAPTIONS, "🤷🏼‍♂ 彩虹 ﬁ Ａ，", "e\u0301\n x", "<s>", "[BOI1] </s>"]:
        assert tokenizer.decode(tokenizer.encode(caption)) == normalise(caption)
    assert tokenizer.encode("") == []


def test_training_is_deterministic_and_bounded(tokenizer, tmp_path):
    again = train(CAPTIONS, tmp_path / "again.model", 330)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.path.read_bytes() == tokenizer.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.model"]
    many = ["".join(chr(0x4E00 + (i * 7 + j) % 900) for j in range(9)) for i in range(300)]
    for captions in (CAPTIONS[:1], CAPTIONS, many):
        for size in (5, 40, 322, 323, 485, 50_000):
            model = train(captions, tmp_path / "m.model", size)
            assert model.vocab_size <= size
            if size >= 323:
                line = captions[-1]
                assert model.decode(model.encode(line)) == line


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(DataError, match="no captions"):
        train(["", " \n"], tmp_path / "m", 485)
    with pytest.raises(ConfigError, match="at least 5"):
        train(CAPTIONS, tmp_path / "m", 4)
    assert not list(tmp_path.iterdir())


def _control_ids(path):
    processor = spm.SentencePieceProcessor(model_file=str(path))
    return {i for i in range(processor.vocab_size()) if processor.is_control(i)}


def test_hostile_captions_never_become_control_ids(tokenizer):
    control = _control_ids(tokenizer.path)
    assert control == {1, 2}
    for caption in HOSTILE:
        ids = tokenizer.encode(caption)
        assert control.isdisjoint(ids)
        assert 0 not in ids
        # Oracle: the same characters without the spelling that means something.
        apart = [tokenizer.encode(f"x{c}")[-1] for c in caption if c.isalpha()]
        assert len(ids) >= len(apart) > 0 or not any(c.isalpha() for c in caption)


def test_a_model_that_leaks_control_ids_is_refused(tokenizer, monkeypatch):
    class Leaking(spm.SentencePieceProcessor):
        """Reads ``</s>`` inside a text as the control id it names."""

        def encode(self, texts, **options):
            ids = super().encode(texts, **options)
            return [[*each, 2] if "x</s>" in f"x{text}" else each
                    for text, each in zip(texts, ids, strict=True)]  # fmt: skip

    monkeypatch.setattr(spm, "SentencePieceProcessor", Leaking)
    with pytest.raises(DataError, match="control ids"):
        TextTokenizer(tokenizer.path)


def test_errors_name_file_and_numbers(tokenizer, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer(tmp_path / "none.model")
    for content in (b"", b"no model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match="not a SentencePiece model"):
            TextTokenizer(tmp_path / "bad.model")
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(DataError, match=f"0..{tokenizer.vocab_size - 1}"):
        tokenizer.decode([tokenizer.vocab_size])
    size = tokenizer.vocab_size
    tokenizer.check_fits(VocabConfig(num_image_codes=8, num_text_ids=size))
    with pytest.raises(ConfigError, match=f"{size - 1}.*{size} pieces"):
        tokenizer.check_fits(VocabConfig(num_image_codes=8, num_text_ids=size - 1))


def test_adopt_copies_only_a_model(tokenizer, tmp_path):
    copy = adopt(tokenizer.path, tmp_path / "copy.model")
    assert copy.fingerprint == tokenizer.fingerprint
    (tmp_path / "bad").write_bytes(b"x")
    with pytest.raises(DataError):
        adopt(tmp_path / "bad", tmp_path / "out.model")
    assert not (tmp_path / "out.model").exists()


@pytest.mark.skipif(not COGVIEW.is_file(), reason="CogView's own model is not here")
def test_cogviews_own_model_loads():
    cogview = TextTokenizer(COGVIEW)
    cogview.check_fits(VocabConfig())
    assert cogview.vocab_size == 50_000
    assert cogview.encode("一只可爱的小狗在草地上奔跑") == [
        15955, 32637, 44355, 43373, 44314, 3198, 12368,
    ]  # fmt: skip
    for caption in HOSTILE:
        assert _control_ids(COGVIEW).isdisjoint(cogview.encode(caption))
    for caption in ("黑色的连衣裙", "夕阳下的大海，波光粼粼。", "a red bus"):
        back = cogview.decode(cogview.encode(caption))
        assert back == unicodedata.normalize("NFKC", caption)

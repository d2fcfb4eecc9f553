"""data.preview: records come back as captions and pictures; the page survives any caption."""

import base64
import io
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.data.preview import preview
from megatron_cogview.data.preview_page import data_uri, escape, render
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import MANIFEST
from megatron_cogview.data.split import threshold
from megatron_cogview.storage.digest import read_json_with_digest, write_json_with_digest
from megatron_cogview.testing.data_faults.small_set import random_records, write_set
from megatron_cogview.tokenization.image import load_image_tokenizer, save_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer, train
from megatron_cogview.tokenization.vq_model import VQModel

REPOSITORY = Path(__file__).resolve().parents[2]
CAPTIONS = (
    "<script>alert('x')</script> & <img src=x onerror=y>",
    "一只猫坐在窗台上",
    '"quoted" \u202ereversed\u202c text\u200b',
    "plain words",
)
GRID, NUM_CODES = 4, 32


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.captions, self._in_caption = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag == "bdi":
            self._in_caption = True
            self.captions.append("")

    def handle_endtag(self, tag):
        self._in_caption = self._in_caption and tag != "bdi"

    def handle_data(self, data):
        if self._in_caption:
            self.captions[-1] += data


def pixels_of(uri):
    head, data = uri.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A text tokenizer that spells every byte, and an untrained image tokenizer."""
    folder = tmp_path_factory.mktemp("tools")
    train(CAPTIONS, folder / "text.model", 700)
    config = ImageTokenizerConfig(
        image_size=GRID * 4, downsampling_layers=2, hidden_size=8, code_dim=4, num_codes=NUM_CODES
    )
    torch.manual_seed(0)
    save_image_tokenizer(VQModel(config), config, folder / "image.safetensors")
    return folder


def load(tools):
    return TextTokenizer(tools / "text.model"), load_image_tokenizer(tools / "image.safetensors")


def make(folder, tools, sides=(GRID,), counts=(6, 0, 3)):
    """Records whose captions are ``CAPTIONS`` in turn, by the order of their ids."""
    text, image = load(tools)
    parts = []
    for k, count in enumerate(counts):
        records = random_records(count, sides, seed=k)
        for n, record in enumerate(records):
            ids = text.encode(CAPTIONS[n % len(CAPTIONS)])
            record["text"] = [*ids, *[0] * (64 - len(ids))]
            record["text_length"] = len(ids)
        for i in range(len(sides)):
            records[f"image{i}"] %= NUM_CODES
        parts.append(records)
    tokenizers = {
        "text": {"fingerprint": text.fingerprint, "vocab_size": text.vocab_size},
        "image": {"fingerprint": image.fingerprint, "num_codes": NUM_CODES},
    }
    write_set(folder, parts, tokenizers)
    return folder


@pytest.fixture(scope="module")
def whole(tools, tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"), tools)


@pytest.fixture
def tokens(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "tokens")


def test_records_come_back(tokens, tools):
    text, image = load(tools)
    found = preview(tokens, text, image, count=100)
    records = ShardSet(tokens).read(np.arange(9))
    assert [item.number for item in found.shown] == list(range(9))
    for item, record in zip(found.shown, records, strict=True):
        assert item.sample_id == record["sample_id"]
        assert item.text_ids == record["text"][: record["text_length"]].tolist()
        assert item.caption == text.decode(item.text_ids)
        codes = torch.from_numpy(record["image0"].astype(np.int64))[None]
        assert (item.pictures[0] == image.decode(codes)[0].numpy()).all()
        below = int(record["sample_id"]) < threshold(100)
        assert item.part == ("validation" if below else "training")
    assert found.shown[5].place == "shard-000000.npy, record 5"
    assert found.shown[6].place == "shard-000002.npy, record 0"
    sides = [item.part for item in found.shown]
    assert sides.count("validation") == found.num_validation
    assert sides.count("training") == found.num_train == 9 - found.num_validation
    split = ShardSet(tokens).split(0.01)
    validation = split.validation(np.arange(split.num_validation)).tolist()
    assert [i for i, side in enumerate(sides) if side == "validation"] == validation
    assert found.text_lengths == records["text_length"].tolist()
    assert found.num_bytes == sum(p.stat().st_size for p in tokens.iterdir())


def test_which_records(tokens):
    chosen = [[s.number for s in preview(tokens, count=4, seed=k).shown] for k in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len({tuple(c) for c in chosen}) > 1
    assert all(len(set(c)) == 4 and c == sorted(c) for c in chosen)
    assert [s.number for s in preview(tokens, records=(8, 0, 8)).shown] == [8, 0, 8]
    assert preview(tokens, count=0).shown == []
    for wrong in (-1, 9):
        with pytest.raises(ConfigError, match=r"records = .*0\.\.8"):
            preview(tokens, records=(wrong,))
    with pytest.raises(ConfigError, match="count"):
        preview(tokens, count=-1)


def test_many_records_pass_in_pieces(tokens, tools, monkeypatch):
    text, image = load(tools)
    whole = preview(tokens, text, image)
    monkeypatch.setattr("megatron_cogview.data.preview.AT_ONCE", 2)
    assert render(preview(tokens, text, image)) == render(whole)


def test_foreign_tokenizers_are_refused_and_both_named(tokens, tools):
    text, image = load(tools)
    manifest = read_json_with_digest(tokens / MANIFEST)
    for kind, given in (("text", text), ("image", image)):
        tokenizers = manifest["tokenizers"] | {kind: {"fingerprint": "0" * 64}}
        write_json_with_digest(tokens / MANIFEST, manifest | {"tokenizers": tokenizers})
        with pytest.raises(DataError, match=f"{kind} tokenizer {'0' * 64}.*{given.fingerprint}"):
            preview(tokens, text, image)
    assert len(preview(tokens, text).shown) == 9


def test_the_page_is_self_contained_and_shows_captions_as_text(tokens, tools):
    text, image = load(tools)
    found = preview(tokens, text, image)
    page = Page(render(found))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert names.count("img") == 9
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src")]
    assert all(link.startswith("data:image/") for link in links)
    assert [pixels_of(uri).shape for uri in page.images] == [(16, 16, 3)] * 9
    assert (pixels_of(page.images[0]) == found.shown[0].pictures[0]).all()
    captions = set(page.captions)
    assert CAPTIONS[0] in captions
    assert CAPTIONS[1] in captions
    assert '"quoted" U+202EreversedU+202C textU+200B' in captions


def test_what_cannot_be_seen_is_spelt_out():
    text = "a\0b\x1b\u202e\u2066\ud800\ufeff\U000e0041<i>"
    shown = escape(text)
    assert re.sub("<.*?>", "", shown) == "aU+0000bU+001BU+202EU+2066U+D800U+FEFFU+E0041&lt;i&gt;"
    shown.encode("utf-8")
    # What joins emoji and shapes letters of some scripts stays.
    assert escape("👩‍👩 नमस्‌ते 猫") == "👩‍👩 नमस्‌ते 猫"


def test_hostile_manifests_are_escaped(tokens):
    manifest = read_json_with_digest(tokens / MANIFEST)
    manifest["source"] = {"<b>": "<script>\ud800"}
    manifest["rejected"] = {"<script>1</script>": 3}
    write_json_with_digest(tokens / MANIFEST, manifest)
    text = render(preview(tokens))
    text.encode("utf-8")
    assert {"script", "b"} & {tag for tag, _ in Page(text.split("</style>")[1]).tags} <= {"b"}
    assert "&lt;b&gt;" in text
    assert "<script" not in text
    assert "rejected: 3" in text


def test_without_tokenizers(tokens):
    found = preview(tokens, records=(3,))
    assert found.shown[0].caption is None
    codes = ShardSet(tokens).read(np.array([3]))["image0"][0].astype(int)
    page = Page(render(found))
    assert (pixels_of(page.images[0]) == codes * 255 // (NUM_CODES - 1)).all()
    assert page.captions == ["no text tokenizer: ids only"]
    assert " ".join(map(str, found.shown[0].text_ids)) in render(found)


def test_two_images(tools, tmp_path):
    make(tmp_path, tools, sides=(2, GRID))
    text, image = load(tools)
    (item,) = preview(tmp_path, text, image, records=(1,)).shown
    assert [p.shape for p in item.pictures] == [(8, 8, 3), (16, 16, 3)]
    assert item.faults == []
    assert len(Page(render(preview(tmp_path, text, image))).images) == 18

    class Other:
        """A tokenizer of one size."""

        config, fingerprint, decode = image.config, image.fingerprint, image.decode

    (item,) = preview(tmp_path, text, Other(), records=(1,)).shown
    assert [p.ndim for p in item.pictures] == [2, 3]
    assert "image0: 2 x 2 codes" in item.faults[0]


def test_what_cannot_be_decoded_is_shown_as_such(tools, tmp_path):
    text, image = load(tools)
    records = random_records(2, (GRID,))
    records["image0"] %= NUM_CODES
    records["image0"][0, 0, 0] = NUM_CODES
    records["sample_id"] = 0, 1
    records["text"][:, 0] = 60_000
    tokenizers = {
        "text": {"fingerprint": text.fingerprint},
        "image": {"fingerprint": image.fingerprint, "num_codes": NUM_CODES},
    }
    write_set(tmp_path, [records], tokenizers)
    found = preview(tmp_path, text, image)
    assert [p.pictures[0].ndim for p in found.shown] == [2, 3]
    assert [len(p.faults) for p in found.shown] == [2, 1]
    assert render(found).count('class="fault"') == 3


def test_damage_is_refused(tokens):
    path = tokens / "shard-000000.npy"
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="record 5 fails its CRC32"):
        preview(tokens)


def test_large_pictures_become_jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert data_uri(noise).startswith("data:image/jpeg")
    assert data_uri(np.zeros((128, 128, 3), np.uint8)).startswith("data:image/png")
    # Codes are never blurred.
    assert data_uri(noise.reshape(128, -1)).startswith("data:image/png")


def test_tool(tokens, tools, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        output = ("--output", tmp_path / "pages" / "page.html")
        argv = ["inspect_shards.py", "--shards", tokens, *output, *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        runpy.run_path(str(REPOSITORY / "tools" / "inspect_shards.py"), run_name="__main__")

    text, image = tools / "text.model", tools / "image.safetensors"
    run("--text-tokenizer", text, "--image-tokenizer", image, "--records", 1, 5)
    assert "2 of 9 records" in capsys.readouterr().out
    page = Page((tmp_path / "pages" / "page.html").read_text(encoding="utf-8"))
    assert len(page.images) == 2
    with pytest.raises(SystemExit, match="error: records = 77"):
        run("--records", 77)

"""The shapes demo data: what is held out, fixed bytes, and a checker that can be trusted."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "shapes"))
scene = importlib.import_module("scene")
render = importlib.import_module("render")
check = importlib.import_module("check")


def draw(seed: int, **attributes: str) -> Image.Image:
    """One rendered scene."""
    picture = render.render_scene(attributes, np.random.default_rng(seed))
    assert isinstance(picture, Image.Image)
    return picture


def share_right(count: int, radius: float = 0.0) -> float:
    """The share of `count` fresh renders, blurred by `radius`, that are read fully right."""
    rng = np.random.default_rng(123)
    combinations = scene.all_combinations()
    right = 0
    for index in range(count):
        wanted = combinations[index % len(combinations)]
        picture = render.render_scene(wanted, rng).filter(ImageFilter.GaussianBlur(radius))
        right += check.read_scene(picture) == wanted
    return right / count


def test_every_pair_of_values_is_seen_and_no_held_out_combination_is() -> None:
    seen, held_out = scene.seen_combinations(), scene.held_out_combinations()
    assert len(held_out) == 24
    assert len(seen) == 120
    assert not [combination for combination in held_out if combination in seen]
    assert all(prompt in seen for prompt in scene.seen_prompt_combinations())
    for first, second in itertools.combinations(scene.ATTRIBUTES, 2):
        pairs = {(combination[first], combination[second]) for combination in seen}
        expected = len(scene.ATTRIBUTES[first]) * len(scene.ATTRIBUTES[second])
        assert len(pairs) == expected, (first, second)


def test_same_arguments_give_the_same_bytes_and_records_are_complete(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        render.write_dataset(tmp_path / folder, num_pairs=25, seed=3, pairs_per_tar=10)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    tars = ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert names == ["prompts.jsonl", *tars]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / tars[1]) as archive:
        members = archive.getmembers()
        assert [member.name for member in members[:2]] == ["000010.png", "000010.json"]
        assert all(member.mtime == member.uid == member.gid == 0 for member in members)
        stream = archive.extractfile("000011.json")
        assert stream is not None
        record = json.loads(stream.read())
    assert record["caption"] == record["caption_en"] != record["caption_zh"]
    attributes = {name: record[name] for name in scene.ATTRIBUTES}
    assert attributes in scene.seen_combinations()


def test_other_seeds_give_other_pictures_and_a_foreign_tar_is_refused(tmp_path: Path) -> None:
    assert render.make_pair(0, seed=0)[1] != render.make_pair(0, seed=1)[1]
    (tmp_path / "train-000007.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="train-000007"):
        render.write_dataset(tmp_path, num_pairs=5, seed=0, pairs_per_tar=5)


def test_prompts_ask_for_every_held_out_combination_and_as_many_seen_ones() -> None:
    prompts = render.make_prompts()
    assert len(prompts) >= 240
    assert len({prompt["id"] for prompt in prompts}) == len(prompts)
    for split, known in (
        ("held_out", scene.held_out_combinations()),
        ("seen", scene.seen_combinations()),
    ):
        mine = [prompt for prompt in prompts if prompt["split"] == split]
        asked = {tuple(prompt[name] for name in scene.ATTRIBUTES) for prompt in mine}
        assert len(mine) == len(prompts) // 2
        assert len(asked) == 24
        assert asked <= {tuple(combination.values()) for combination in known}


def test_captions_name_every_attribute() -> None:
    for phrasing in range(5):
        for write in (render.caption_zh, render.caption_en):
            captions = {write(combination, phrasing) for combination in scene.all_combinations()}
            assert len(captions) == 144


def test_the_checker_reads_fresh_renders() -> None:
    assert share_right(300) >= 0.99


def test_the_checker_reads_blurred_renders() -> None:
    assert share_right(144, radius=1.2) >= 0.98


@pytest.mark.parametrize(
    ("name", "value"),
    [("colour", "blue"), ("shape", "cross"), ("size", "large"), ("position", "right")],
)
def test_the_checker_sees_a_swapped_attribute_and_only_that(name: str, value: str) -> None:
    wanted = {"colour": "red", "shape": "circle", "size": "small", "position": "left"}
    read = check.read_scene(draw(0, **{**wanted, name: value}))
    assert read == {**wanted, name: value} != wanted


def test_the_checker_does_not_read_scenes_into_noise_blanks_or_two_shapes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    assert check.read_scene(Image.fromarray(noise))["shape"] == "unknown"
    blank = check.read_scene(Image.new("RGB", (64, 64), (240, 240, 240)))
    assert set(blank.values()) == {"unknown"}
    left = draw(0, colour="red", shape="circle", size="small", position="left")
    right = draw(0, colour="red", shape="circle", size="small", position="right")
    both = Image.fromarray(np.minimum(np.asarray(left), np.asarray(right)))
    assert check.read_scene(both)["shape"] == "unknown"


def test_missing_and_broken_pictures_are_wrong_and_listed(tmp_path: Path) -> None:
    prompts = [prompt for prompt in render.make_prompts() if prompt["split"] == "seen"][:4]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for prompt in prompts[:2]:
        wanted = {name: prompt[name] for name in scene.ATTRIBUTES}
        draw(1, **wanted).save(pictures / f"{prompt['id']}.png")
    (pictures / f"{prompts[2]['id']}.png").write_bytes(b"not a picture")
    output = tmp_path / "accuracy.json"
    arguments = ["--pictures", pictures, "--prompts", file, "--output", output, "--renders", 3]
    reconstructions = ["--reconstructions", pictures, "--records", file]
    check.main([str(argument) for argument in arguments + reconstructions])
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["seen"]["all"] == result["seen"]["colour"] == 0.5
    assert result["seen"]["count"] == 4
    assert result["missing"] == [prompt["id"] for prompt in prompts[2:]]
    assert [row["right"] for row in result["pictures"]] == [True, True, False, False]
    assert result["renders"] == 1.0
    assert result["reconstructions"] == 0.5


def test_wrong_inputs_are_one_message(tmp_path: Path) -> None:
    arguments = ["--pictures", str(tmp_path), "--output", str(tmp_path / "accuracy.json")]
    with pytest.raises(SystemExit, match="cannot read"):
        check.main([*arguments, "--prompts", str(tmp_path / "absent.jsonl")])
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="line 1: no field 'colour'"):
        check.main([*arguments, "--prompts", str(tmp_path / "bad.jsonl")])

"""data.manifest_fields: what a manifest must hold; every wrong or missing field is named."""

import copy

import pytest

from megatron_cogview.data.manifest_fields import field_errors
from megatron_cogview.data.shards import read_manifest
from megatron_cogview.testing.data_faults.small_set import random_records, write_set


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_set(folder, [random_records(n, (4, 2)) for n in (9, 0, 5)])
    return read_manifest(folder)


def changed(manifest, path, value):
    """A copy with another value at a dotted path; None: without it."""
    result = copy.deepcopy(manifest)
    *keys, last = path.split(".")
    target = result
    for key in keys:
        target = target[int(key) if key.isdigit() else key]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return result


def test_what_is_written_has_no_errors(manifest):
    assert field_errors(manifest) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "another"),
        ("layout", None),
        ("layout.codes_per_side", []),
        ("layout.codes_per_side", [4, 0]),
        ("layout.codes_per_side", [True]),
        ("layout.longest_text", 65),
        ("layout.text_budget", 0),
        ("layout.text_ids", 63),
        ("tokenizers.text.fingerprint", ""),
        ("tokenizers.text.vocab_size", None),
        ("tokenizers.text.vocab_size", True),
        ("tokenizers.image.num_codes", 65_537),
        ("tokenizers.image.fingerprint", 3),
        ("records", 15),
        ("records", "14"),
        ("split_table", None),
        ("split_table.name", "../split-000000000000.npy"),
        ("split_table.sha256", "A" * 64),
        ("rejected", {"empty caption": "1"}),
        ("rejected_log", {"name": "../x", "sha256": "0" * 64}),
        ("shards", {}),
        ("shards", [3]),
        ("shards.0.name", "../shard-000000.npy"),
        ("shards.0.name", "shard-000001.npy"),
        ("shards.0.records", -1),
        ("shards.0.bytes", None),
        ("shards.0.sha256", "0"),
    ],
)
def test_wrong_fields_are_named(manifest, field, value):
    errors = field_errors(changed(manifest, field, value))
    name = field.split(".")[-1]
    assert any(name in error for error in errors)
    if value is None:
        assert any("missing" in error for error in errors)


@pytest.mark.parametrize(
    "field", ["layout.text_ids", "layout.text_budget", "rejected", "rejected_log", "counts"]
)
def test_fields_that_may_be_absent(manifest, field):
    assert field_errors(changed(manifest, field, None)) == []


def test_all_errors_are_given(manifest):
    wrong = changed(changed(manifest, "format", "x"), "shards.2.sha256", "y")
    errors = field_errors(wrong)
    assert [error.split()[0] for error in errors] == ["format", "shards[2].sha256"]
    assert errors[1] == "shards[2].sha256 is 'y', must be a SHA-256, 64 hexadecimal digits"

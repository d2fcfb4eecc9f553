"""Every preset builds, has the parameters its formula says, and takes sequences of its length."""

from megatron_cogview.configs.presets import PRESETS
from megatron_cogview.testing.distributed import run_distributed


def test_every_preset_on_the_meta_device() -> None:
    results = run_distributed("tests.parallel.dry_run_cases:dry_run", 1, timeout_s=180)[0]
    assert set(results) == set(PRESETS)
    for name, result in results.items():
        config = PRESETS[name]()
        assert result["devices"] == ["meta"], name
        assert result["parameters"] == config.model.num_params(), name
        rows = config.model.vocab.padded_size
        assert result["logits"] == [2, config.sequence.model_length, rows], name

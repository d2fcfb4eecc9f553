"""Who am I (torchrun, Slurm, alone), and what the command line says to wrong input."""

import json

import pytest

from megatron_cogview import cli
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.presets import PRESETS, tiny
from megatron_cogview.parallel.launch import Launch, detect


def test_torchrun_wins_over_slurm():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    address = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert detect({**torchrun, **slurm}) == Launch(
        rank=3, world_size=8, local_rank=1, init_method="env://"
    )
    assert detect({**slurm, **address}) == Launch(
        rank=2, world_size=4, local_rank=0, init_method="tcp://node1:29500"
    )
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        detect(slurm)


def test_alone_also_inside_a_slurm_allocation_without_srun():
    for environment in ({}, {"SLURM_NTASKS": "16"}):
        assert detect(environment).world_size == 1


def test_usage_names_tasks_and_presets(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for word in ("pretrain", "train-tokenizer", "generate", "plan", *PRESETS):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly", "tiny"], "task = 'fly': must be one of train-tokenizer"),
        (["plan"], "preset: name one after 'plan'"),
        (["plan", "huge"], "preset = 'huge': must be one of tiny"),
        (["plan", "missing.json"], "missing.json: not a run's configuration"),
        (
            ["plan", "base_4b", "--keep-layout", "--gpus", "3", "--parallel.tensor", "3"],
            "parallel.tensor = 3: does not divide model.num_heads = 40",
        ),
        (["generate", "tiny"], "generation.checkpoint: not set"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(capsys, words, message):
    assert cli.main(words) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


def test_fields_are_overridden_and_checked(capsys):
    config, _ = cli._arguments("pretrain", tiny(), ["--training.steps", "7"])
    assert config.training.steps == 7
    with pytest.raises(SystemExit):
        cli._arguments("pretrain", tiny(), ["--model.num-heads", "5"])
    assert "must be a multiple of" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        cli._arguments("pretrain", tiny(), ["--model.num-hedas", "5"])


def test_a_run_restarts_from_its_own_configuration(tmp_path):
    config, _ = cli._arguments("pretrain", tiny(), ["--optimizer.lr", "0.5"])
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert cli.base_config(str(path)) == config
    value = json.loads(config.to_json())
    value["model"]["num_wings"] = 2
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="num_wings"):
        cli.base_config(str(path))

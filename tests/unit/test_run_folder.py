"""What a run folder says about the run, and that the run restarts from it."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megatron_cogview
from megatron_cogview import cli
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.presets import tiny
from megatron_cogview.kernels import tuning
from megatron_cogview.training import run_folder

ONE = SimpleNamespace(
    rank=0,
    is_main=True,
    device=torch.device("cpu"),
    world_size=1,
    tensor_size=1,
    pipeline_size=1,
    data_size=1,
)


def starts(folder):
    return json.loads((folder / "versions.json").read_text())


def test_each_start_is_kept_with_what_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["megatron_cogview", "pretrain", "tiny"])
    config = tiny()
    run_folder.write(tmp_path, config, ONE)
    monkeypatch.setattr("sys.argv", ["megatron_cogview", "pretrain", "run/config.json", "--x"])
    later = replace(
        config,
        optimizer=replace(config.optimizer, lr=0.5),
        data=replace(config.data, shards=("a", "b")),
    )
    run_folder.write(tmp_path, later, ONE)
    run_folder.write(tmp_path, later, ONE)
    first, second, third = starts(tmp_path)
    assert first["command"] == ["megatron_cogview", "pretrain", "tiny"]
    assert first["changed_settings"] == third["changed_settings"] == {}
    assert second["command"][2:] == ["run/config.json", "--x"]
    assert second["changed_settings"] == {
        "optimizer.lr": [config.optimizer.lr, 0.5],
        "data.shards": [list(config.data.shards), ["a", "b"]],
    }
    assert first["versions"]["torch"] == torch.__version__
    assert {"python", "system", "numpy", "megatron-core"} <= first["versions"].keys()
    assert first["devices"] == {"CPU": 1} and sum(first["hosts"].values()) == 1
    assert first["layout"] == {"world": 1, "tensor": 1, "pipeline": 1, "data": 1}
    assert first["source"]["version"] == megatron_cogview.__version__
    assert first["time"].endswith("+00:00")


def test_a_run_restarts_from_its_configuration(tmp_path):
    """What the command line makes of ``config.json`` is the configuration that was written."""
    base = tiny()
    odd = replace(
        base,
        model=replace(base.model, hidden_dropout=0.0625),
        data=replace(base.data, shards=("some where", "über"), weights=(0.25, 0.75)),
        training=replace(base.training, output=str(tmp_path), seed=7),
        survival=replace(base.survival, skip_steps=(3, 9)),
        profile=True,
    )
    run_folder.write(tmp_path, odd, ONE)
    path = str(tmp_path / "config.json")
    assert cli.base_config(path) == odd
    assert cli._arguments("pretrain", cli.base_config(path), []) == (odd, {})
    changed, _ = cli._arguments("pretrain", cli.base_config(path), ["--training.seed", "8"])
    assert changed == replace(odd, training=replace(odd.training, seed=8))


def test_other_kernel_sizes_are_recorded_and_said(tmp_path, monkeypatch, caplog):
    run_folder.write(tmp_path, tiny(), ONE)
    run_folder.write(tmp_path, tiny(), ONE)
    assert "other sizes" not in caplog.text
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({**tuning.made_for(), "sizes": {"a": [16, 4]}}))
    monkeypatch.setenv(tuning.VARIABLE, str(sizes))
    tuning.measured_sizes.cache_clear()
    try:
        run_folder.write(tmp_path, tiny(), ONE)
        assert "other sizes" in caplog.text
        sizes.write_text("{")
        tuning.measured_sizes.cache_clear()
        with pytest.raises(ConfigError, match="cannot be read as JSON"):
            run_folder.write(tmp_path, tiny(), ONE)
    finally:
        tuning.measured_sizes.cache_clear()
    kept = [start["kernel_sizes"] for start in starts(tmp_path)]
    assert kept == [{"fixed": 1}, {"fixed": 1}, {'{"a": [16, 4]}': 1}]


def test_a_damaged_list_of_starts_is_put_aside(tmp_path, caplog):
    for damaged in ("{", '{"no": "list"}'):
        (tmp_path / "versions.json").write_text(damaged)
        run_folder.write(tmp_path, tiny(), ONE)
        assert len(starts(tmp_path)) == 1
        assert (tmp_path / "versions.json.damaged").read_text() == damaged
    assert "kept as versions.json.damaged" in caplog.text


def test_one_rank_writes(tmp_path):
    other = SimpleNamespace(**{**vars(ONE), "rank": 1, "is_main": False})
    run_folder.write(tmp_path / "run", tiny(), other)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A package committed to a repository of its own."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "first")
    return package


def git(folder, *words):
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_the_commit_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    found = run_folder.source_of(checkout)
    assert found == {"version": megatron_cogview.__version__, "commit": head, "dirty": False}
    # What lies beside the package is not what runs.
    (checkout.parent / "notes.txt").touch()
    assert run_folder.source_of(checkout)["dirty"] is False
    (checkout / "new_module.py").touch()
    assert run_folder.source_of(checkout)["dirty"] is True
    (checkout / "new_module.py").unlink()
    (checkout / "__init__.py").write_text("changed = 1\n")
    assert run_folder.source_of(checkout)["dirty"] is True


def test_an_installed_package_has_no_commit(checkout, tmp_path):
    installed = checkout.parent / ".venv" / "lib" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    for folder in (installed, tmp_path):
        assert run_folder.source_of(folder) == {"version": megatron_cogview.__version__}


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "commit" not in run_folder.source_of(checkout)

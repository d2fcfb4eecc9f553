"""The image tokenizer's training as a user starts it: one process, and two by torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from safetensors.torch import load_file

from megatron_cogview.testing.picture_tars import write_tars

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 120
"""Several times what two busy cores need."""
FLAGS = """
    --image-tokenizer.image-size 16 --image-tokenizer.downsampling-layers 1
    --image-tokenizer.hidden-size 8 --image-tokenizer.code-dim 4
    --tokenizer-training.steps 5 --tokenizer-training.batch-size 7
    --tokenizer-training.warmup-steps 2 --tokenizer-training.validation-fraction 0.2
    --tokenizer-training.log-every 2
"""


def train(data: Path, output: Path, launcher: tuple[str, ...]) -> None:
    command = [sys.executable, *launcher, "-m", "megatron_cogview", "train-tokenizer", "tiny"]
    command += [*FLAGS.split(), "--tokenizer-training.data", str(data)]
    command += ["--tokenizer-training.output", str(output)]
    # Two processes cannot share one GPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            said, _ = child.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            if child.poll() is None:
                # torchrun's workers have process groups of their own.
                family = psutil.Process(child.pid).children(recursive=True)
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, said[-4000:]


def test_torchrun_trains_what_one_process_does(tmp_path: Path) -> None:
    """The final file to fp32 rounding; two runs side by side would be refused one folder."""
    data = write_tars(tmp_path / "tars")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for name, launcher in (("one", ()), ("two", two)):
        train(data, tmp_path / name, launcher)
    files = [tmp_path / name / "image_tokenizer.safetensors" for name in ("one", "two")]
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (other[key] - value).abs().max() <= 1e-5 * value.abs().max(), key
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")
    ]
    assert abs(summaries[0]["psnr"] - summaries[1]["psnr"]) < 1e-3
    assert summaries[0]["codes_used"] == summaries[1]["codes_used"]

"""The whole path on one command: pairs, tokenizers, tokens, training, pictures, report.

    python examples/demo/run.py --output runs/demo
    python examples/demo/run.py --output runs/clothing --data FOLDER
    python examples/demo/run.py --output runs/demo-vqgan --image-tokenizer tiny_vqgan

Every stage is an ordinary command, printed before it runs; this program holds no logic of its own
beyond their order.  Run again, it skips what is done and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from stages import Command, Runner, Stage, StageError, shown

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.presets import preset, tiny
from megatron_cogview.storage.atomic import locked_directory, write_text

if TYPE_CHECKING:
    from types import FrameType

PROMPT_COUNT = 64
TOKENIZERS = ("tiny", "tiny_vqgan")
"""Presets whose image tokenizers give the grid and the codes that ``tiny`` trains on."""
INTERRUPTED = 130


@dataclass(frozen=True)
class Size:
    """How much work; ``full`` leaves the preset as it is."""

    pairs: int
    fresh: int
    tokenizer: str = ""
    pretrain: str = ""


SIZES = {
    "full": Size(pairs=6000, fresh=500),
    "micro": Size(
        pairs=200,
        fresh=40,
        tokenizer="--tokenizer-training.steps 12 --tokenizer-training.save-every 6 "
        "--tokenizer-training.log-every 3 --tokenizer-training.warmup-steps 2 "
        "--tokenizer-training.batch-size 16 --tokenizer-training.adversarial.start-step 6 "
        "--tokenizer-training.codebook-warmup-steps 0",
        pretrain="--training.steps 10 --training.save-every 5 --training.log-every 2 "
        "--training.global-batch-size 16 --training.micro-batch-size 16 "
        "--training.validate-every 10 --training.validation-batches 1",
    ),
}


def command(*parts: str | Path, processes: int = 1) -> Command:
    """A command from words, which are split at spaces, and paths, which are not."""
    words: list[str] = []
    for part in parts:
        words += [shown(part)] if isinstance(part, Path) else part.split()
    return Command(tuple(words), processes)


def training_processes() -> int:
    """Two, unless there is one GPU: NCCL takes one process per device."""
    return 1 if torch.cuda.device_count() == 1 else 2


def plan(run: Path, data: Path | None, size: Size, tokenizer: str = "tiny") -> list[Stage]:
    """The stages, in order, before the report; ``tokenizer`` is one of ``TOKENIZERS``."""
    processes = training_processes()
    pairs = data or run / "pairs"
    prompts = run / "prompts.jsonl" if data else pairs / "prompts.jsonl"
    text, image, tokens = run / "text.model", run / "image_tokenizer", run / "tokens"
    weights = image / "image_tokenizer.safetensors"
    training = run / "pretrain"
    learn_text = command(
        *("tools/train_text_tokenizer.py --data", pairs, "--output", text),
        # Few pieces keep the words of the embedded captions apart: a piece that holds a whole
        # phrase says nothing about a combination of words that was never seen.
        f"--vocab-size {741 if data else 160}",
    )
    learn_images = command(
        *(f"-m megatron_cogview train-tokenizer {tokenizer} --tokenizer-training.data", pairs),
        *("--tokenizer-training.output", image, size.tokenizer),
        processes=processes,
    )
    tokenise = command(
        *("tools/tokenize_dataset.py --data", pairs, "--text-tokenizer", text),
        *("--image-tokenizer", weights, "--output", tokens, "--preset tiny"),
        # Captions of unknown length: cutting one is counted and reported, losing its picture worse.
        "--text-policy truncate" if data else "",
    )
    pretrain = command(
        f"-m megatron_cogview pretrain tiny --parallel.tensor {processes}",
        *("--data.shards", tokens),
        *("--training.output", training, size.pretrain),
        processes=processes,
    )
    generate = command(
        "-m megatron_cogview generate tiny --parallel.tensor 1",
        *("--generation.checkpoint", training / "checkpoints"),
        *("--generation.text-tokenizer", text, "--generation.image-tokenizer", weights),
        *("--generation.prompts", prompts, "--generation.output", run / "generated"),
    )
    models = (text, weights, training / "checkpoints")
    stages = [
        Stage("text tokenizer", (learn_text,), (pairs,), (text,)),
        Stage("image tokenizer", (learn_images,), (pairs,), (image,)),
        Stage("tokens", (tokenise,), (pairs, text, weights), (tokens,)),
        Stage("pretrain", (pretrain,), (tokens,), (training,)),
        Stage("generate", (generate,), (*models, prompts), (run / "generated",)),
    ]
    if data:
        sample = command(
            *("tools/sample_prompts.py --data", pairs, f"--count {PROMPT_COUNT} --output", prompts),
            *("--text-tokenizer", text, "--preset tiny"),
        )
        stages.insert(1, Stage("prompts", (sample,), (pairs, text), (prompts,)))
        return stages
    render = command(
        *("examples/shapes/render.py --output", pairs, f"--num-pairs {size.pairs} --seed 0")
    )
    return [Stage("pairs", (render,), (), (pairs,)), *stages, _check(run, weights, prompts, size)]


def _check(run: Path, weights: Path, prompts: Path, size: Size) -> Stage:
    """Fresh pictures through the image tokenizer, and everything judged."""
    fresh, copies, accuracy = run / "fresh", run / "reconstructions", run / "accuracy.json"
    records = copies / "records.jsonl"
    commands = (
        command(
            *("examples/shapes/render.py --output", fresh),
            f"--num-pairs {size.fresh} --seed 12345",
        ),
        command(
            *("tools/reconstruct.py --data", fresh, "--image-tokenizer", weights),
            *("--output", copies, f"--limit {size.fresh}"),
        ),
        command(
            *("examples/shapes/check.py --pictures", run / "generated", "--prompts", prompts),
            *(f"--renders {size.fresh} --reconstructions", copies, "--records", records),
            *("--output", accuracy),
        ),
    )
    inputs = (run / "generated", weights, prompts)
    return Stage("check", commands, inputs, (fresh, copies, accuracy))


def report_stage(run: Path, data: Path | None) -> Stage:
    """The last stage; ``timings.json`` must have been written."""
    arguments: list[str | Path] = ["tools/make_report.py --run", run]
    inputs = [run / "image_tokenizer" / "summary.json", run / "tokens" / "manifest.json"]
    inputs += [run / "pretrain" / "metrics.jsonl", run / "generated", run / "timings.json"]
    if data is None:
        accuracy, prompts = run / "accuracy.json", run / "pairs" / "prompts.jsonl"
        arguments += ["--accuracy", accuracy, "--prompts", prompts]
        inputs += [accuracy, prompts, run / "reconstructions" / "sheet.png"]
    outputs = (run / "report.json", run / "report.html")
    return Stage("report", (command(*arguments),), tuple(inputs), outputs)


def write_timings(run: Path, done: dict[str, dict[str, Any]]) -> None:
    """Seconds and peak memory of the stages so far, for the report."""
    names = ("seconds", "peak_rss_bytes")
    stages = {stage: {name: stamp[name] for name in names} for stage, stamp in done.items()}
    write_text(run / "timings.json", json.dumps({"stages": stages}, indent=1) + "\n")


def summarise(run: Path) -> None:
    """The headline numbers, and where to look."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    print("\n== done")
    if report["accuracy"] is not None:
        for split, what in (("seen", "seen"), ("held_out", "never seen")):
            share = report["accuracy"][split]
            print(f"all four right, {what + ':':<12} {share['all']:.1%}", end="  ")
            print(f"colour {share['colour']:.1%}")
    print(f"reconstructions: {report['reconstruction_psnr']:.1f} dB")
    for kind, loss in report["losses"].items():
        if loss["drop"] is not None:
            print(f"{kind} loss: {loss['first']:.3f} -> {loss['last']:.3f}")
    print(f"time: {report['seconds']['total']:.0f} s, ", end="")
    print(f"peak memory {report['peak_rss_bytes'] / 1e9:.2f} GB")
    print(f"pictures: {shown(run / 'generated' / 'grid.png')}")
    print(f"report:   {shown(run / 'report.html')}")


def run_all(run: Path, data: Path | None, size: Size, tokenizer: str) -> None:
    """Everything, in order.

    Raises:
        StageError, DataError: what went wrong.
    """
    if data is not None and not list(data.glob("*.tar")):
        raise DataError(f"--data {data}: no such folder, or no *.tar in it")
    (run / ".stages").mkdir(parents=True, exist_ok=True)
    with locked_directory(run / ".stages"):
        # Values of presets decide a stage's result as much as the words of its command.
        values = [tiny().to_json()]
        values += [] if tokenizer == "tiny" else [preset(tokenizer).to_json()]
        runner = Runner(run, "\n".join(values))
        for stage in plan(run, data, size, tokenizer):
            runner.run(stage)
        write_timings(run, runner.done)
        runner.run(report_stage(run, data))
    summarise(run)


def _on_terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """The command line; the exit code is 0, 1 after an error, 130 after an interruption."""
    parser = argparse.ArgumentParser(description="From pairs to pictures and a report.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="run folder")
    parser.add_argument("--data", type=Path, help="folder of WebDataset tars, not the shapes")
    parser.add_argument("--size", choices=SIZES, default="full", help="micro: a test, in a minute")
    parser.add_argument(
        "--image-tokenizer", choices=TOKENIZERS, default="tiny", help="preset of the tokenizer"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        run_all(options.output, options.data, SIZES[options.size], options.image_tokenizer)
    except (StageError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())

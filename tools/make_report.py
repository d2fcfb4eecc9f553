"""Write report.json and report.html of a run folder.

python tools/make_report.py --run runs/demo --accuracy runs/demo/accuracy.json
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from megatron_cogview.configs.errors import DataError
from megatron_cogview.evaluation.html_report import render
from megatron_cogview.evaluation.report import build_report, read_run
from megatron_cogview.storage.atomic import write_text


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Report on a run."""

    run: Path
    """Folder with image_tokenizer, tokens, pretrain and generated."""
    accuracy: Path | None = None
    """What a checker wrote about the pictures; without it accuracy is null."""
    prompts: Path | None = None
    """The prompts that were drawn, for their split and what was asked."""


def report_on(arguments: Arguments) -> dict[str, Any]:
    """Write both files; the report."""
    run = read_run(arguments.run, arguments.accuracy, arguments.prompts)
    report = build_report(run)
    page = render(report, run)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_text(arguments.run / "report.json", text)
    write_text(arguments.run / "report.html", page)
    return report


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        report_on(arguments)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.run / 'report.html'}\n{arguments.run / 'report.json'}")


if __name__ == "__main__":
    main()

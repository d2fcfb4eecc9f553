"""Tasks by name.  A task is one module with ``run``; it is imported only when it is chosen."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

TASKS = {
    "train-tokenizer": "train the image tokenizer on a folder of tars",
    "pretrain": "train the transformer on token shards",
    "generate": "draw pictures from captions",
    "plan": "show what a run would need per GPU, without running it",
}


def load(task: str) -> Callable[..., Any]:
    """The ``run`` function of a task."""
    module = import_module(f"megatron_cogview.tasks.{task.replace('-', '_')}")
    run: Callable[..., Any] = module.run
    return run

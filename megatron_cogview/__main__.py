"""``python -m megatron_cogview``."""

import sys

from megatron_cogview.cli import main

# The guard matters: checkpoint writers are started with "spawn", which imports this file again.
if __name__ == "__main__":
    sys.exit(main())

"""CogView, a text-to-image transformer, trained at scale.

Importing the package gives its version and nothing else: it must stay cheap, so that ``--help``,
``plan`` and the data tools start without loading torch.
"""

__version__ = "0.1.0"

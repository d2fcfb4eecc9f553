"""The errors a user can mend.  Each message names the field, the value and the remedy."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(ValueError):
    """Input data that cannot be used: a missing file, a damaged shard, a foreign tokenizer."""


class TrainingError(RuntimeError):
    """Training that has gone wrong in a way that going on would only make worse."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, damaged or made for another model."""


def refuse(field: str, value: object, why: str) -> ConfigError:
    """The error for one setting: the field as typed on the command line, its value, and why."""
    return ConfigError(f"{field} = {value!r}: {why}")

"""The CogView transformer on megatron-core, through its ModuleSpec slots."""

"""Which tensor gets which type, so that a file of a wanted size loses least."""

from athena_gguf.allocate.choice import check_target, choose_types, kept_losses, predicted_kld
from athena_gguf.allocate.target import PRESETS, Target, parse_target, target_settings

__all__ = [
    "PRESETS",
    "Target",
    "check_target",
    "choose_types",
    "kept_losses",
    "parse_target",
    "predicted_kld",
    "target_settings",
]

"""Which tensor gets which type, so that a file of a wanted size loses least."""

from athena_gguf.allocate.choice import choose_types, kept_losses, predicted_kld, sizes_and_room
from athena_gguf.allocate.target import PRESETS, Target, parse_target, target_settings

__all__ = [
    "PRESETS",
    "Target",
    "choose_types",
    "kept_losses",
    "parse_target",
    "predicted_kld",
    "sizes_and_room",
    "target_settings",
]

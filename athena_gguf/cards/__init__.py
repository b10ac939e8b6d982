"""A process for every GPU beyond the first, which Python's lock would have wait for each other in one."""

from athena_gguf.cards.card import Card, Cards

__all__ = ["Card", "Cards"]

"""What a model file says about its tokenizer, whichever kind of file it is.

tokenizer.json, tokenizer_config.json ─┐
                                       ├─▶ Parts ─▶ Tokenizer
GGUF metadata ─────────────────────────┘
"""

from dataclasses import dataclass, field

import tokenizers


@dataclass(slots=True)
class Parts:
    """A tokenizer as loaded."""

    backend: tokenizers.Tokenizer
    """Splits, merges and knows the added tokens; its own post-processor is not used."""
    prefix: tuple[int, ...] = ()
    """Ids put before a raw prompt, such as BOS."""
    suffix: tuple[int, ...] = ()
    """Ids put after a raw prompt."""
    templates: dict[str, str] = field(default_factory=dict)
    """Sources of the chat templates by name; "default" is the usual one, "tool_use" the one for requests with tools."""
    names: dict[str, str] = field(default_factory=dict)
    """Special tokens by the name that templates give them: bos_token, eos_token, …"""

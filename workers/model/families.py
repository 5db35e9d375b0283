"""The families served, by the name that `headrace.engine.checkpoint.card.FAMILIES` gives them."""

from collections.abc import Callable

from headrace.engine.checkpoint.card import FAMILIES
from headrace.engine.errors import UserError
from headrace.workers.loader import Checkpoint
from headrace.workers.model import gemma3, llama, mixtral, qwen2, qwen3, qwen3_moe
from headrace.workers.model.config import DecoderConfig, WeightNames

DESCRIBE: dict[str, Callable[[Checkpoint], tuple[DecoderConfig, WeightNames]]] = {
    "llama": llama.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
    "qwen3_moe": qwen3_moe.describe,
    "mixtral": mixtral.describe,
    "gemma3": gemma3.describe,
}


def describe(architecture: str, checkpoint: Checkpoint) -> tuple[DecoderConfig, WeightNames]:
    """The checkpoint as data for the decoder. `architecture` is a key of FAMILIES. Raises UserError."""
    if architecture not in FAMILIES:
        raise UserError(f'architecture "{architecture}" is not supported: supported are {", ".join(FAMILIES)}')
    return DESCRIBE[FAMILIES[architecture]](checkpoint)

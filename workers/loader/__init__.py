"""Reading checkpoints: one file a format, and the one form in which the model builder sees them."""

from headrace.workers.loader.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]

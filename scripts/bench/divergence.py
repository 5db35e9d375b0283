"""How far one model's next-token distributions are from another's, and the file in which llama-perplexity takes them.

For a scored token t with oracle p and measured q: KL(p ‖ q) = Σ p (ln p - ln q) over the vocabulary, the loss -ln q[t], and whether both
favour the same token. Means are over all scored tokens.

    "_logits_" │ tokens a chunk │ vocabulary │ chunks │ all tokens, int32 │ for each scored token: scale, least f32 │ codes uint16 [V]

ln p ≈ least + scale * code: 16 nats in 65,535 steps. Below that, and below e^-16, llama-perplexity leaves a token out of its sum.
"""

from typing import BinaryIO

import msgspec
import numpy as np
import torch

RANGE_NATS = 16.0
STEPS = 65535


class Divergence(msgspec.Struct):
    """Sums over scored tokens, from which the figures follow."""

    losses: list[float] = []
    oracle_losses: list[float] = []
    kls: list[float] = []
    same_top: int = 0

    def add(self, oracle: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor, least: float = -torch.inf) -> None:
        """Take in rows: the oracle's ln p [n, V], measured logits [n, V], what followed [n]; where ln p ≤ `least`, nothing is summed."""
        measured = torch.log_softmax(logits.double(), -1)
        terms = torch.where(oracle > least, oracle.exp() * (oracle - measured), 0.0)
        self.kls += terms.sum(-1).tolist()
        self.losses += (-measured.gather(1, tokens[:, None])[:, 0]).tolist()
        self.oracle_losses += (-oracle.gather(1, tokens[:, None])[:, 0]).tolist()
        self.same_top += int((oracle.argmax(-1) == measured.argmax(-1)).sum())

    def figures(self) -> "Figures":
        losses, kls = np.array(self.losses), np.array(self.kls)
        excess = losses - np.array(self.oracle_losses)
        count = len(kls)
        return Figures(
            tokens=count,
            perplexity=float(np.exp(losses.mean())),
            excess=float(excess.mean()),
            kl=float(kls.mean()),
            kl_error=float(kls.std() / np.sqrt(count)),
            kl_99=float(np.quantile(kls, 0.99)),
            same_top=self.same_top / count,
        )


class Figures(msgspec.Struct):
    """Of one engine. Logarithms are natural."""

    tokens: int
    perplexity: float
    excess: float
    """ln(perplexity / the oracle's)."""
    kl: float
    """Mean KL divergence a token."""
    kl_error: float
    """Its standard error."""
    kl_99: float
    """The 99th percentile over tokens."""
    same_top: float
    """Share of tokens where the most likely one is the oracle's."""


def write_head(file: BinaryIO, chunks: np.ndarray, vocabulary: int) -> None:
    """`chunks` is int32 [chunks, tokens]."""
    count, length = chunks.shape
    file.write(b"_logits_")
    file.write(np.array([length, vocabulary, count], np.int32).tobytes())
    file.write(np.ascontiguousarray(chunks, np.int32).tobytes())


def pack(logits: np.ndarray) -> np.ndarray:
    """Rows of logits, float32 [n, V], as the file has them: uint16 [n, 4 + V, rounded up to an even number]."""
    count, vocabulary = logits.shape
    most = logits.max(-1, keepdims=True)
    least = np.maximum(logits.min(-1, keepdims=True), most - np.float32(RANGE_NATS))
    scale = (most - least) / np.float32(STEPS)
    log_sum = np.log(np.exp((logits - most).astype(np.float64)).sum(-1, keepdims=True))
    packed = np.zeros((count, 4 + 2 * ((vocabulary + 1) // 2)), np.uint16)
    packed[:, :4] = np.concatenate([scale, least - most - log_sum], -1).astype(np.float32).view(np.uint16)
    codes = np.rint((np.maximum(logits, least) - least) / np.where(scale > 0, scale, 1))
    packed[:, 4 : 4 + vocabulary] = np.minimum(codes, STEPS)
    return packed


def unpack(packed: np.ndarray, vocabulary: int) -> np.ndarray:
    """ln p as a reader of the file has it, float32 [n, V]."""
    head = np.ascontiguousarray(packed[:, :4]).view(np.float32)
    return head[:, :1] * packed[:, 4 : 4 + vocabulary].astype(np.float32) + head[:, 1:]

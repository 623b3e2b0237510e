"""Sizes of the ops' inputs, by name: what a case of ``shapes`` has as its shape."""

from typing import NamedTuple


class LossShape(NamedTuple):
    """Features [pairs, dim]; ``matched`` is how alike the pairs are: 0 at the start of training, more at its end."""

    pairs: int
    dim: int
    scale: float = 14.3
    matched: float = 0.0

    def __str__(self) -> str:
        return f"N={self.pairs} D={self.dim} scale={self.scale:g} matched={self.matched:g}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.pairs**2


class ViewShape(LossShape):
    """Two views [pairs, dim] of as many images; each view is among all of both."""

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return (2 * self.pairs) ** 2


class SigmoidShape(NamedTuple):
    """Features [pairs, dim], and a bias of the logits; ``matched`` as of :class:`LossShape`."""

    pairs: int
    dim: int
    scale: float = 10.0
    bias: float = -10.0
    matched: float = 0.0

    def __str__(self) -> str:
        return f"N={self.pairs} D={self.dim} scale={self.scale:g} bias={self.bias:g} matched={self.matched:g}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.pairs**2


class QueueShape(NamedTuple):
    """Features [pairs, dim] and a queue [queue, dim] of negatives, beside the other keys if they are ``in_batch``."""

    pairs: int
    queue: int
    dim: int
    scale: float = 14.3
    matched: float = 0.0
    in_batch: bool = False

    def __str__(self) -> str:
        keys = " in batch" if self.in_batch else ""
        return f"N={self.pairs} K={self.queue} D={self.dim} scale={self.scale:g} matched={self.matched:g}{keys}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.pairs * (self.queue + (self.pairs if self.in_batch else 1))


class AttentionShape(NamedTuple):
    """A packed projection [batch, tokens, 3 heads head_dim]."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    causal: bool = False

    def __str__(self) -> str:
        return f"B={self.batch} T={self.tokens} H={self.heads} D={self.head_dim}{' causal' if self.causal else ''}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return max(self.batch * self.heads * self.tokens**2, 3 * self.batch * self.tokens * self.heads * self.head_dim)


class PatchShape(NamedTuple):
    """Images [batch, 3, height, width] as bytes or floats, and a projection [embed_dim, 3, patch, patch]."""

    batch: int
    height: int
    width: int
    patch: int
    embed_dim: int
    uint8: bool = True

    def __str__(self) -> str:
        kind = "bytes" if self.uint8 else "floats"
        return f"B={self.batch} {self.height}x{self.width} P={self.patch} E={self.embed_dim} {kind}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        tokens = 1 + self.height * self.width // self.patch**2
        return self.batch * max(3 * self.height * self.width, tokens * self.embed_dim)


class TextShape(NamedTuple):
    """Ids [batch, length] of a table [vocab, width]."""

    batch: int
    length: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"B={self.batch} L={self.length} V={self.vocab} W={self.width}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return max(self.batch * self.length, self.vocab) * self.width


AnyLoss = LossShape | SigmoidShape | QueueShape
Shape = AnyLoss | AttentionShape | PatchShape | TextShape

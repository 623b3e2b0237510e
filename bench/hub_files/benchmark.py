"""The loss, attention and layer norm beside PyTorch: ``kernels benchmark`` runs this file."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class ContrastiveLoss(Benchmark):
    """CLIP's loss of 4,096 pairs, on a CPU of 512, forward and backward; the result is the images' gradient."""

    seed = 0

    def setup(self) -> None:
        """Make normalised features of images and texts, and CLIP's scale late in training."""
        pairs = 512 if self.device == "cpu" else 4096
        image, text = torch.randn(2, pairs, 512, device=self.device)
        self.image, self.text = (F.normalize(x, dim=-1).requires_grad_() for x in (image, text))
        self.scale = torch.tensor(100.0, device=self.device)

    def benchmark_loss(self) -> None:
        """Run the kernels of the contrastive loss, forward and backward."""
        loss = self.kernel.contrastive_loss(self.image, self.text, self.scale)
        (self.out,) = torch.autograd.grad(loss, self.image)

    def verify_loss(self) -> torch.Tensor:
        """Compute the contrastive loss and its gradient as two cross-entropies over the matrix of logits."""
        logits = self.scale * self.image @ self.text.T
        target = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return torch.autograd.grad(loss, self.image)[0]


class Attention(Benchmark):
    """The attention of ViT-B/16's images, 12 heads of 64 over 197 tokens, forward."""

    seed = 0

    def setup(self) -> None:
        """Make a packed projection of queries, keys and values."""
        batch, dtype = (2, torch.float32) if self.device == "cpu" else (64, torch.bfloat16)
        self.qkv = torch.randn(batch, 197, 3 * 12 * 64, device=self.device, dtype=dtype)

    def benchmark_attention(self) -> None:
        """Run the attention kernel."""
        self.out = self.kernel.attention(self.qkv, 12)

    def verify_attention(self) -> torch.Tensor:
        """Compute the attention by PyTorch's kernel."""
        q, k, v = self.qkv.unflatten(-1, (3, 12, 64)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class LayerNorm(Benchmark):
    """The layer norm of ViT-L/14's images over 1,024 columns, forward."""

    seed = 0

    def setup(self) -> None:
        """Make the rows, the weight and the bias of a layer norm."""
        rows, dtype = (514, torch.float32) if self.device == "cpu" else (16448, torch.bfloat16)
        self.x = torch.randn(rows, 1024, device=self.device, dtype=dtype)
        self.weight, self.bias = torch.randn(2, 1024, device=self.device, dtype=dtype)

    def benchmark_layer_norm(self) -> None:
        """Run the layer norm kernel."""
        self.out = self.kernel.layer_norm(self.x, self.weight, self.bias)

    def verify_layer_norm(self) -> torch.Tensor:
        """Compute the layer norm by PyTorch's kernel."""
        return F.layer_norm(self.x, self.x.shape[-1:], self.weight, self.bias)

"""Tells patches of real images from decoded ones (PatchGAN, Isola et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 16  # channels that a norm takes together
# Of the adaptive weight, in the original's units: a reconstruction loss that is a sum over an image.
LARGEST, EPSILON = 1e4, 1e-4


class PatchDiscriminator(nn.Module):
    """Strided convolutions to one number a patch.

    Where the original has batch norms, this has group norms: a batch and its micro-batches agree, and
    batches of one can be trained on.

    Args:
        channels: of the first layer, a multiple of 16; they double up to eightfold.
        layers: of stride two; a patch is 70 pixels wide with three.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**depth, 8) for depth in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for depth in range(1, layers + 1):
            stride = 2 if depth < layers else 1
            parts += [
                nn.Conv2d(widths[depth - 1], widths[depth], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(widths[depth] // GROUP, widths[depth]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for part in self.layers:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(b, 3, h, w)`` in [-1, 1] to ``(b, 1, h', w')``: high for real ones."""
        return self.layers(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return what the discriminator minimises (Lim and Ye 2017).

    Args:
        real: its numbers for real images, any shape.
        fake: for decoded ones.
    """
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor, elements: int = 1) -> Tensor:
    """Return the factor that gives two losses gradients of one size at a layer (Esser et al. 2021, eq. 7).

    The original's reconstruction is a sum over an image, and its factor at most 1e4. Where it is a mean, the
    same factor is as many times smaller as an image has elements, and so is its limit.

    Args:
        reconstruction: loss, with its graph.
        adversarial: likewise; a mean over patches, here as there.
        last: weights of the decoder's last layer.
        elements: of an image that ``reconstruction`` is a mean over; 1 for a sum.

    Returns:
        A number from 0 to 1e4 / ``elements``, without a graph.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (found,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (wanted.norm() / (found.norm() + EPSILON)).clamp(0.0, LARGEST / elements).detach()

"""VGG-16 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import check_sizes, he_init, pixel_mean

# Planes of the convolutions in units of the width; 0 is a 2x2 max-pool.
_PLAN = (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0)


class VGG16(nn.Module):
    r"""VGG-16 for small images, as in the experiments of the SWA paper.

    Thirteen 3x3 convolutions with bias, each followed by ReLU, in five groups of w, 2w, 4w, 8w and
    8w planes that each end in a 2x2 max-pool; then dropout, linear 8w to 8w, ReLU, dropout, linear
    8w to 8w, ReLU, linear 8w to K, with dropout probability 1/2. Convolutions start from a normal
    distribution with standard deviation :math:`\sqrt{2/(k^2\,c_\text{out})}` and bias 0; linear
    layers and BatchNorm keep PyTorch's default.

    Args:
        width: planes w of the first convolution; 64 in the papers.
        batch_norm: puts BatchNorm between every convolution (which keeps its bias) and its ReLU.
            The SWA paper's network has none.

    Images have 32x32 pixels or more; the last max-pool leaves more than one of 64x64, which are
    averaged.

    Raises:
        ValueError: a size below 1.

    Sources: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", ICLR 2015; Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
    Generalization", UAI 2018, arXiv 1803.05407.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 64,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
        self.features = nn.Sequential()
        channels = in_channels
        for factor in _PLAN:
            if factor == 0:
                self.features.append(nn.MaxPool2d(2))
                continue
            self.features.append(nn.Conv2d(channels, factor * width, 3, padding=1))
            channels = factor * width
            if batch_norm:
                self.features.append(nn.BatchNorm2d(channels))
            self.features.append(nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, num_classes),
        )

        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(pixel_mean(self.features(x)))
        return logits

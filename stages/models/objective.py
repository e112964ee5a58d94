"""How both papers weight their losses. `stages.models.losses` computes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.base import Config
from stages.models.architecture import Pix2Pix, Pix2PixHD

GanKind = Literal["least_squares", "hinge", "bce"]
DiffAugmentKind = Literal["colour", "translation", "cutout"]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossWeights(Config):
    """What the generator minimises. A weight of 0 leaves the term out, and its cost too.

    The pix2pix ablations: L1 only (gan_weight 0), GAN or cGAN alone (l1 0), L1+GAN, L1+cGAN; whether the
    discriminator sees the source is the architecture's `conditional`.
    """

    gan: Annotated[
        GanKind,
        Field(description="The adversarial loss; bce is the non-saturating one of Goodfellow et al."),
    ] = "least_squares"
    gan_weight: Annotated[Weight, Field(description="Weight of the adversarial loss.")] = 1.0
    feature_matching: Annotated[
        Weight, Field(description="Weight of the feature matching loss (Wang et al., equation 4).")
    ] = 10.0
    l1: Annotated[Weight, Field(description="Weight of the L1 loss (Isola et al., equation 3).")] = 0.0
    perceptual: Annotated[
        Weight, Field(description="Weight of the VGG19 perceptual loss; needs train.vgg_weights.")
    ] = 0.0

    lpips: Annotated[Weight, Field(description="Weight of LPIPS as a loss; needs train.lpips.")] = 0.0
    r1: Annotated[
        Weight,
        Field(
            description="Gamma of the R1 penalty on the discriminator's gradients at real images (Mescheder "
            "et al. 2018). Steps take longer."
        ),
    ] = 0.0
    diff_augment: Annotated[
        tuple[DiffAugmentKind, ...],
        Field(
            description="Augment what the discriminator sees, real and generated (Zhao et al. 2020): any of "
            "colour, translation, cutout. For few pairs."
        ),
    ] = ()

    @property
    def uses_discriminator(self) -> bool:
        """Whether any term needs a discriminator."""
        return self.gan_weight > 0 or self.feature_matching > 0


def paper_weights(arch: Pix2Pix | Pix2PixHD) -> LossWeights:
    """Isola et al.: L1 (100) + cGAN with BCE. Wang et al.: least squares + feature matching (10)."""
    if isinstance(arch, Pix2Pix):
        return LossWeights(gan="bce", feature_matching=0, l1=100)
    return LossWeights()

"""The masked autoencoder (MAE, arXiv:2111.06377): encode what is visible, rebuild what is not."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.position import sincos_positions


class MAE(nn.Module):
    """An encoder with timm's parameter names, and a light decoder. Sizes are settings; nothing is wired to 224.

    Only visible patches are embedded, and the decoder has mask tokens for the predicted patches alone. Both may be any
    sets: what is where comes from positions. A patch of neither set takes no part, so that predicting some of the
    masked patches (CrossMAE, arXiv:2401.14391) saves the decoder's work on the others.

    Args:
        size: Height and width of the images in pixels, or one number for square ones.
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int],
        patch: int,
        embed_dim: int,
        depth: int,
        heads: int,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        height, width = size if isinstance(size, tuple) else (size, size)
        self.patch, self.norm_pix_loss = patch, norm_pix_loss
        self.rows, self.cols = height // patch, width // patch
        self.encoder: Any = VisionTransformer(
            img_size=(height, width),
            patch_size=patch,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            weight_init="skip",
        )
        positions, decoder_positions = (sincos_positions(dim, self.rows, self.cols) for dim in (embed_dim, decoder_dim))
        self.encoder.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_positions", decoder_positions, persistent=False)
        self.decoder_positions: Tensor
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pixels = nn.Linear(decoder_dim, 3 * patch * patch)
        self._initialise()

    def _initialise(self) -> None:
        """MAE's start: Xavier-uniform linears, the patch embedding as one of them, tokens of deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.data.flatten(1))
        nn.init.zeros_(projection.bias)
        for token in (self.encoder.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
        weights: Float[Tensor, "batch visible"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean squared error over the predicted patches' target pixels, in fp32. For `weights` see `encode`."""
        patches = patchify(images, self.patch)
        latent = self.encode(gather(patches, ids_visible), ids_visible, weights)
        return self.losses(patches, self.decoder_tokens(latent, ids_visible, ids_predicted), ids_predicted).mean()

    def losses(
        self,
        patches: Float[Tensor, "batch patches pixels"],
        tokens: Float[Tensor, "batch length decoder_dim"],
        ids_predicted: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted"]:
        """Of each predicted patch, the mean squared error over its pixels, in fp32; `tokens` are `decoder_tokens`."""
        predicted = self.decode(tokens, ids_predicted.shape[1]).float()
        return (predicted - self.targets(patches, ids_predicted)).square().mean(dim=-1)

    def targets(
        self, patches: Float[Tensor, "batch patches pixels"], ids_predicted: Int64[Tensor, "batch predicted"]
    ) -> Float[Tensor, "batch predicted pixels"]:
        """What is to be predicted: pixels as they are, or normalised patch by patch; in fp32."""
        target = gather(patches, ids_predicted).float()
        return normalised_per_patch(target) if self.norm_pix_loss else target

    def predict(
        self,
        patches: Float[Tensor, "batch patches pixels"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted pixels"]:
        """The decoder's pixels of the predicted patches."""
        latent = self.encode(gather(patches, ids_visible), ids_visible)
        return self.decode(self.decoder_tokens(latent, ids_visible, ids_predicted), ids_predicted.shape[1])

    def encode(
        self,
        visible: Float[Tensor, "batch visible pixels"],
        ids_visible: Int64[Tensor, "batch visible"],
        weights: Float[Tensor, "batch visible"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Class token and visible tokens after the encoder's last norm.

        Args:
            weights: A factor on each embedded patch that the backward pass alone sees: no value changes, nor does what
                reaches the patches, and the weight's gradient is (token, its gradient), as if it had been 1.
        """
        encoder, projection = self.encoder, self.encoder.patch_embed.proj
        x = F.linear(visible, projection.weight.flatten(1), projection.bias)
        x = x + gather(encoder.pos_embed[:, 1:].expand(len(x), -1, -1), ids_visible)
        if weights is not None:
            x = x + x.detach() * (weights - weights.detach())[..., None]
        token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([token.to(x.dtype), x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)

    def decoder_tokens(
        self,
        latent: Float[Tensor, "batch tokens dim"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch length decoder_dim"]:
        """What the decoder's blocks read: class token, visible tokens, mask tokens, each at its position.

        A second decoder may read the same (HPM's predictor of losses); `ids_predicted` may have no column.
        """
        x = self.decoder_embed(latent)
        positions = self.decoder_positions[:, 1:].expand(len(x), -1, -1)
        masked = self.mask_token + gather(positions, ids_predicted)
        seen = x[:, 1:] + gather(positions, ids_visible)
        return torch.cat([x[:, :1] + self.decoder_positions[:, :1], seen, masked.to(x.dtype)], dim=1)

    def decode(
        self, tokens: Float[Tensor, "batch length decoder_dim"], predicted: int
    ) -> Float[Tensor, "batch predicted pixels"]:
        """Pixels of the last `predicted` tokens."""
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pixels(self.decoder_norm(tokens[:, tokens.shape[1] - predicted :]))

    @torch.no_grad()
    def reconstruct(
        self,
        images: Float[Tensor, "batch 3 height width"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """The image with its masked patches predicted; patches of neither set are 0.

        With norm_pix_loss a patch's own mean and deviation are put back, as in MAE's images: the network was never
        asked for them, so colours and contrast in such an image are not its work.
        """
        patches = patchify(images, self.patch)
        predicted = self.predict(patches, ids_visible, ids_predicted).float()
        if self.norm_pix_loss:
            truth = gather(patches, ids_predicted).float()
            variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        image = torch.zeros_like(patches)
        for ids, pixels in ((ids_visible, gather(patches, ids_visible)), (ids_predicted, predicted)):
            image.scatter_(1, ids[..., None].expand_as(pixels), pixels.to(image.dtype))
        return unpatchify(image, self.patch, rows=self.rows)


def patchify(images: Float[Tensor, "batch 3 height width"], patch: int) -> Float[Tensor, "batch patches pixels"]:
    """Patches row by row; within one, channel, then row, then column: the order of a convolution's weights."""
    batch, _, height, width = images.shape
    blocks = images.reshape(batch, 3, height // patch, patch, width // patch, patch)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 3 * patch * patch)


def unpatchify(
    patches: Float[Tensor, "batch patches pixels"], patch: int, *, rows: int
) -> Float[Tensor, "batch 3 height width"]:
    """`patchify` undone, for `rows` patches from top to bottom."""
    cols = patches.shape[1] // rows
    blocks = patches.reshape(len(patches), rows, cols, 3, patch, patch)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), 3, rows * patch, cols * patch)


def gather(
    values: Float[Tensor, "batch patches dim"], ids: Int64[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen dim"]:
    """Rows `ids` of each image."""
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def normalised_per_patch(patches: Float[Tensor, "batch patches pixels"]) -> Float[Tensor, "batch patches pixels"]:
    """norm_pix: each patch minus its mean, over sqrt(unbiased variance + 1e-6)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * torch.rsqrt(variance + 1e-6)

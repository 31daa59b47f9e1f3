"""AutoMAE (arXiv:2303.06583): a generator over class attention says which patches must be masked, and learns it.

The attention of its frozen scorer is read from the shards. What the released code does and the paper leaves open is
taken from the code (github.com/hyperea/automae).
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pretrain.mae import MAE
from pretrain.masking.budget import lowest
from pretrain.masking.config import MaskingConfig
from pretrain.masking.discriminator import CORNERS, Discriminator, rectangles
from pretrain.masking.inputs import Inputs
from pretrain.masking.learned import Learned
from shards.rng import GUMBEL, RECTANGLE
from training.distributed import average_gradients, is_main, mean_over_ranks
from training.update import update

MASK_FACTOR = 0.5
"""What a selected patch has on top of its noise."""
ADVERSARIAL = 0.2
"""Weight of what the discriminator says beside the reconstruction."""


class Generator(nn.Module):
    """3x3 convolutions, from an attention map a head to half as many and to one. The last has no bias, which would
    learn from rounding alone: the softmax over patches takes it away."""

    def __init__(self, heads: int):
        super().__init__()
        hidden = max(1, heads // 2)
        self.convolutions = nn.Sequential(
            nn.Conv2d(heads, hidden, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, kernel_size=3, padding=1, bias=False),
        )

    def forward(self, attention: Float[Tensor, "batch heads rows cols"]) -> Float[Tensor, "batch patches"]:
        """Logits of all patches of the image."""
        return self.convolutions(attention).flatten(1)


class AutoMAE(Learned):
    """Generator and discriminator. With logits l of the patches, Gumbel noise g and uniform noise u,

        p = softmax(l + g)                                  over all patches of the image, kept or not
        w = u + 0.5 · ([among the k highest of p] - sg(p) + p)
        the M patches of the highest w are masked

    A token's value does not follow from w, but its gradient reaches w as if w multiplied it; so p learns from visible
    patches alone. Loss = reconstruction + 0.2 · (D(p) - 1)², both minimised by the generator, which is in the run's
    optimizer. The discriminator D has one of its own, and learns on the same batch, ahead of the step.
    """

    def __init__(self, config: MaskingConfig, mae: MAE, heads: int):
        """`mae` changes nothing."""
        super().__init__()
        self.config = config
        self.generator = Generator(heads)
        self.discriminator = Discriminator().requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=0.0, betas=(0.9, 0.95))
        self.d_skipped = 0
        self._seen: dict[str, Tensor] = {}
        self._terms: list[Tensor] = []
        self._images = 0
        self._last = torch.zeros(1, 1)

    def begin(self, inputs: Inputs, rate: float) -> None:
        """The discriminator's step: 1 for rectangles, 0 for what the generator makes with noise of its own."""
        patches = inputs.shape[0] * inputs.shape[1]
        with torch.no_grad(), _plain(inputs.device):
            real = rectangles(inputs.uniform(RECTANGLE, CORNERS + patches).double(), inputs.shape)
            noise = gumbel(inputs.uniform(GUMBEL, 2 * patches)[:, patches:])
            made = self._shown(self._logits(attention_shares(inputs)), noise).unflatten(1, inputs.shape)
        self.discriminator.requires_grad_(True).train()
        _, norm = update(self.optimizer, self._discriminator_losses(real, made), rate=rate)
        if not math.isfinite(norm):
            self._tell_skipped()
        self.optimizer.zero_grad()
        self.discriminator.requires_grad_(False).eval()
        for name, maps in (("real_peak", real), ("fake_peak", made)):
            self._seen[name] = maps.flatten(1).amax(dim=1).mean()

    def _tell_skipped(self) -> None:
        """The discriminator's step was left out, on every rank; said once, and counted in the log."""
        if not self.d_skipped and is_main():
            print(
                "the gradient of automae's discriminator is not finite, and its step is skipped; lower --base-lr or "
                "--automae-gan-scale",
                file=sys.stderr,
            )
        self.d_skipped += 1

    def _discriminator_losses(
        self, real: Float[Tensor, "batch rows cols"], made: Float[Tensor, "batch rows cols"]
    ) -> Iterator[Float[Tensor, ""]]:
        on_real, on_made = self._discriminated(torch.cat([real, made])).chunk(2)
        self._seen |= {"d_real": on_real.detach().mean(), "d_fake": on_made.detach().mean()}
        yield (on_real - 1).square().mean() + on_made.square().mean()
        average_gradients(self.discriminator.parameters())

    @torch.no_grad()
    def scores(
        self, inputs: Inputs, progress: float
    ) -> tuple[
        Float[Tensor, "batch kept"], tuple[Float[Tensor, "batch heads rows cols"], Float[Tensor, "batch patches"]]
    ]:
        """Minus w; and the attention and the Gumbel noise. As many patches as stay visible are selected, or as many as
        are masked; `progress` changes nothing.

        Of 196 patches a selected one is masked, because 49 of the 147 others have less noise than 0.5; all but once in
        30,000 images.
        """
        attention, noise = attention_shares(inputs), gumbel(inputs.uniform(GUMBEL, inputs.shape[0] * inputs.shape[1]))
        with _plain(inputs.device):
            self._last = logits = self._logits(attention)
        masked = inputs.masked
        count = masked if self.config.automae_select == "masked" else inputs.kept.shape[1] - masked
        selected = lowest(-inputs.of_kept(logits + noise), count)
        scores = -(inputs.noise + MASK_FACTOR * selected)
        self._seen["selected_masked"] = (lowest(scores, masked) & selected).sum(dim=1).double().mean() / count
        self._images, self._terms = len(attention), []
        return scores, (attention, noise)

    def loss(
        self,
        mae: MAE,
        images: Float[Tensor, "batch 3 height width"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
        *extra: Tensor,
    ) -> Float[Tensor, ""]:
        """Of w, only 0.5 · p has a gradient, and p is needed at visible patches; `extra` is attention and noise."""
        attention, noise = extra
        with _plain(images.device):
            logits = self._logits(attention)
            weights = MASK_FACTOR * (logits + noise).softmax(dim=1).gather(1, ids_visible)
            said = self._discriminated(self._shown(logits, noise).unflatten(1, attention.shape[2:]))
            adversarial = (said - 1).square().mean()
        reconstruction = mae(images, ids_visible, ids_predicted, weights)
        self._terms.append(torch.stack([reconstruction, adversarial]).detach() * len(images) / self._images)
        return reconstruction + ADVERSARIAL * adversarial

    def _logits(self, attention: Float[Tensor, "batch heads rows cols"]) -> Float[Tensor, "batch patches"]:
        return self.generator(self.config.automae_attention_scale * attention)

    def _shown(
        self, logits: Float[Tensor, "batch patches"], noise: Float[Tensor, "batch patches"]
    ) -> Float[Tensor, "batch patches"]:
        """What the discriminator is shown of a mask."""
        return (logits + noise if self.config.automae_gan_input == "gumbel" else logits).softmax(dim=1)

    def _discriminated(self, maps: Float[Tensor, "batch rows cols"]) -> Float[Tensor, " batch"]:
        return self.discriminator(self.config.automae_gan_scale * maps)

    def figures(self) -> dict[str, float]:
        """d_real, d_fake: what the discriminator said before its step; d_skipped: its steps left out by this process;
        real_peak, fake_peak: the greatest share of a patch in what it was shown; selected_masked: the share of the
        selected patches that is masked; entropy: of the generator without noise, 1 = it prefers no patch; own_share: of
        the variance of its logits over an image, the share that is not the same in every image; reconstruction,
        adversarial: the terms of the loss."""
        terms, logits = torch.stack(self._terms).sum(dim=0), self._last
        shown = self._seen | dict(zip(("reconstruction", "adversarial"), terms, strict=True))
        shown |= {"entropy": entropy(logits).mean(), "variance": logits.var(dim=1).mean()}
        told = dict(zip(shown, mean_over_ranks(torch.stack(list(shown.values()))).tolist(), strict=True))
        common = mean_over_ranks(logits.mean(dim=0)).var().item()
        own_share = 1 - common / max(told.pop("variance"), 1e-30)
        return told | {"own_share": own_share, "d_skipped": self.d_skipped}

    def own_state(self) -> dict[str, Any]:
        """The discriminator's optimizer."""
        return self.optimizer.state_dict()

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        self.optimizer.load_state_dict(state)


def attention_shares(inputs: Inputs) -> Float[Tensor, "batch heads rows cols"]:
    """The share of the class attention that each patch has, as a ViT of this grid would give it: about 1/196 on 14x14,
    however many cells are stored."""
    rows, cols = inputs.shape
    stored_rows, stored_cols = inputs.batch.parts.shape[1:]
    share = inputs.attention * (stored_rows * stored_cols / (rows * cols))
    return share.unflatten(2, inputs.shape)


def gumbel(draws: Float[Tensor, "batch patches"]) -> Float[Tensor, "batch patches"]:
    """-log(-log u), of the middle of each draw's 2⁻²⁴: finite at 0 and below 1."""
    return -(-(draws.double() + 2.0**-25).log()).log().float()


def entropy(logits: Float[Tensor, "batch patches"]) -> Float[Tensor, " batch"]:
    """Of the softmax over patches; 1 where all are alike."""
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1) / math.log(logits.shape[1])


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Full fp32, whatever the run computes in: a mask must not depend on it."""
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
        yield

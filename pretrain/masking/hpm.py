"""HPM (arXiv:2304.05919): the patches are masked whose loss a second decoder predicts to be high."""

import copy

import torch
from jaxtyping import Float, Int64, UInt8
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pretrain.config import PretrainConfig
from pretrain.mae import MAE, gather, patchify
from pretrain.masking.budget import lowest
from pretrain.masking.inputs import Inputs
from pretrain.masking.learned import Learned
from training import distributed
from training.augment import normalised, unit
from training.device import autocast

DECAY, LAST_DECAY, DECAY_EPOCHS = 0.999, 0.9999, 100
"""The teacher's decay rises from the first to the second over so many epochs, however long the run is."""
AT_ONCE = 256
"""Images that the teacher looks at together where --micro-batch says nothing; it keeps nothing of them."""
EPSILON = 1e-6
"""Added to a probability before its logarithm."""


class LossPredictor(nn.Module):
    """A second decoder of the first one's size. It reads the same tokens, so the two share the projection from the
    encoder and the mask token."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        dim = config.decoder_dim
        self.blocks = nn.ModuleList(
            Block(dim, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pixels = nn.Linear(dim, 3 * config.patch**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Float[Tensor, "batch length decoder_dim"]) -> Float[Tensor, "batch patches"]:
        """The predicted loss of every patch, visible or not: as in the authors' code, the mean of as many outputs as it
        has pixel values; in fp32. Only the order in an image means anything."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.pixels(self.norm(tokens[:, 1:])).float().mean(dim=-1)


class HardPatches(Learned):
    """A teacher, which follows encoder and loss predictor, looks at whole images; of the M masked patches, a share
    that grows from 0 to --hard-share with the run's progress is where it predicts the highest loss, the rest random.

    The predictor learns to order the predicted patches by their loss. As in the authors' code, its gradient goes on
    into the encoder. It learns on images of which a quarter is visible and is asked about whole ones, a mismatch that
    the authors acknowledge: `teacher_tau` of the log says how much of the order survives it, `predictor_tau` how much
    is learned (Kendall's tau with the true losses: 0 is chance, 1 the true order).

    Each step costs, beside MAE's, the encoder and the predictor on all kept patches without gradient, and the
    predictor with one. Half of the teacher's first weights are still there after 700 steps at the first decay, 7,000 at
    the last: in a run of a few hundred steps it is mostly untrained, and so are its masks.
    """

    def __init__(self, config: PretrainConfig, mae: MAE, heads: int):
        super().__init__()
        self.config = config
        self.predictor = LossPredictor(config)
        self.teacher = _without_pixels(copy.deepcopy(mae)).requires_grad_(False)
        self.teacher_predictor = copy.deepcopy(self.predictor).requires_grad_(False)
        self.figures_of_step: dict[str, float] = {}
        self.terms, self.images = torch.zeros(4), 1

    def scores(
        self, inputs: Inputs, progress: float
    ) -> tuple[Float[Tensor, "batch kept"], tuple[Float[Tensor, "batch patches"]]]:
        """Noise, less 1 where the highest losses are predicted; and the predicted losses, 0 where no patch is kept."""
        predicted = self.predicted_losses(torch.from_numpy(inputs.batch.images), inputs.kept)
        hard = hard_count(inputs.masked, progress, self.config.hard_share)
        everywhere = predicted.new_zeros(len(predicted), inputs.shape[0] * inputs.shape[1])
        self.figures_of_step = {"hard": hard / inputs.masked}
        self.terms, self.images = predicted.new_zeros(4), len(predicted)
        return hard_scores(inputs.noise, predicted, hard), (everywhere.scatter_(1, inputs.kept, predicted),)

    @torch.no_grad()
    def predicted_losses(
        self, images: UInt8[Tensor, "batch height width 3"], kept: Int64[Tensor, "batch kept"]
    ) -> Float[Tensor, "batch kept"]:
        """What the teacher predicts where all kept patches are visible; a micro-batch at a time."""
        size, none, predicted = self.config.run.micro_batch or AT_ONCE, kept[:, :0], []
        for piece, ids, no_ids in zip(images.split(size), kept.split(size), none.split(size), strict=True):
            pixels = patchify(normalised(unit(piece.to(kept.device))), self.teacher.patch)
            with autocast(kept.device, self.config.run.precision):
                latent = self.teacher.encode(gather(pixels, ids), ids)
                predicted.append(self.teacher_predictor(self.teacher.decoder_tokens(latent, ids, no_ids)))
        return torch.cat(predicted)

    def loss(
        self,
        mae: MAE,
        images: Float[Tensor, "batch 3 height width"],
        ids_visible: Int64[Tensor, "batch visible"],
        ids_predicted: Int64[Tensor, "batch predicted"],
        *extra: Tensor,
    ) -> Float[Tensor, ""]:
        """The pixels' loss and that of the order, with the same weight."""
        patches, count = patchify(images, mae.patch), ids_predicted.shape[1]
        latent = mae.encode(gather(patches, ids_visible), ids_visible)
        tokens = mae.decoder_tokens(latent, ids_visible, ids_predicted)
        losses = mae.losses(patches, tokens, ids_predicted)
        guessed, true = self.predictor(tokens)[:, -count:], losses.detach()
        by_teacher = extra[0].gather(1, ids_predicted)
        order = order_loss(guessed, true)
        seen = torch.stack([true.mean(), order.detach(), tau(guessed.detach(), true), tau(by_teacher, true)])
        self.terms = self.terms + seen * (len(images) / self.images)
        return losses.mean() + order

    @torch.no_grad()
    def accept(self, mae: MAE, progress: float) -> None:
        """teacher ← decay · teacher + (1 - decay) · what is trained."""
        share = 1 - decay_at(progress * self.config.epochs)
        for teacher, trained in ((self.teacher, mae), (self.teacher_predictor, self.predictor)):
            weights = dict(trained.named_parameters())
            for name, weight in teacher.named_parameters():
                weight.lerp_(weights[name], share)

    def figures(self) -> dict[str, float]:
        """Share of the masked patches that are hard ones; the two terms of the loss; tau of predictor and teacher."""
        names = ("reconstruction", "order_loss", "predictor_tau", "teacher_tau")
        return self.figures_of_step | dict(zip(names, distributed.mean_over_ranks(self.terms).tolist(), strict=True))


def decay_at(epoch: float) -> float:
    """The teacher's; their code takes a step of it an epoch."""
    return DECAY + min(1.0, epoch / DECAY_EPOCHS) * (LAST_DECAY - DECAY)


def hard_count(masked: int, progress: float, share: float) -> int:
    """How many of the masked patches are the hardest: M · progress · share, cut to a whole number. Their progress is
    (epoch + 1) / epochs; ours is by step, from 0 to 1."""
    return int(masked * progress * share)


def hard_scores(
    noise: Float[Tensor, "batch kept"], predicted: Float[Tensor, "batch kept"], hard: int
) -> Float[Tensor, "batch kept"]:
    """The noise, in [0, 1); less 1 for the `hard` patches of the highest predicted loss, which are so masked first."""
    return noise - lowest(-predicted, hard).float() if hard else noise


def order_loss(guessed: Float[Tensor, "batch predicted"], true: Float[Tensor, "batch predicted"]) -> Float[Tensor, ""]:
    """Over the pairs (i, j) of an image in which the loss of i is the higher one, the mean of

        -log(sigmoid(guess of i - guess of j) + 1e-6)

    and then the mean over images, where their code divides by the pairs of a batch: the same but where two losses are
    equal, and a micro-batch then weighs as its images do. An image of one patch has no pair and adds 0.
    """
    higher = true[:, :, None] > true[:, None]
    apart = guessed[:, :, None] - guessed[:, None]
    surprise = -(apart.sigmoid() + EPSILON).log() * higher
    return (surprise.sum(dim=(1, 2)) / higher.sum(dim=(1, 2)).clamp(min=1)).mean()


def tau(guessed: Float[Tensor, "batch predicted"], true: Float[Tensor, "batch predicted"]) -> Float[Tensor, ""]:
    """Kendall's tau, mean over images: of the pairs that the true losses order, the share in the same order less the
    share in the other one."""
    orders = [(one[:, :, None] - one[:, None]).sign() for one in (guessed, true)]
    ordered = orders[1].abs().sum(dim=(1, 2)).clamp(min=1)
    return ((orders[0] * orders[1]).sum(dim=(1, 2)) / ordered).mean()


def _without_pixels(mae: MAE) -> MAE:
    """The encoder, and what brings its tokens to a decoder: all that a teacher needs."""
    mae.decoder_blocks = nn.ModuleList()
    del mae.decoder_norm, mae.decoder_pixels
    return mae

"""What the verb `encoder` computes."""

from dataclasses import dataclass

from training.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A small ViT trained on a folder of images: by DINO + iBOT self-distillation, or from a larger frozen one."""

    images: str
    """Images: a folder, a text file of paths, a .tar or a folder of tars; here or at s3://, gs://."""
    teacher: str | None = None
    """Frozen encoder whose tokens the student learns to predict: builtin, timm:NAME, timm:NAME=FILE, ibot:FILE,
    dino:FILE, run:DIR or random:NAME. Both have the same patch grid. Local crops, prototypes, masks and
    --teacher-momentum are not used."""
    encoder_mean: tuple[float, float, float] | None = None
    """Mean by which the teacher's images were normalised, with pixels between 0 and 1; for weights of --teacher that do
    not say. Example: --encoder-mean 0.5 0.5 0.5."""
    encoder_std: tuple[float, float, float] | None = None
    """Deviation that goes with --encoder-mean."""
    teacher_blocks: tuple[int, ...] = ()
    """Start the student from these blocks of the teacher (from 0) and its patch and position embeddings; its tokens
    themselves are trained to match the direction of the teacher's, and --patch, --embed-dim, --depth and --heads are
    not used. Default: a random start, and a linear map of its tokens is trained to match."""
    class_weight: float = 1.0
    """With --teacher: weight of the class token's loss. 0 trains patch tokens alone, which is better for parts."""
    size: int = 224
    """Side of a (global) crop in pixels."""
    local_size: int = 96
    """Side of a local crop in pixels."""
    local_crops: int = 6
    """Local crops per image."""
    patch: int = 16
    """Patch side in pixels."""
    embed_dim: int = 384
    """Width of the ViT."""
    depth: int = 12
    """Blocks of the ViT."""
    heads: int = 6
    """Attention heads per block."""
    prototypes: int = 4096
    """Outputs of the projection head, shared by class and patch tokens."""
    mask_ratio: float = 0.3
    """Share of a global crop's patches that is masked for the student, in blocks."""
    epochs: int = 100
    """Passes over the images; 0 leaves an untrained encoder, as a control."""
    batch_size: int = 256
    """Images a step, over all ranks."""
    base_lr: float = 5e-4
    """Learning rate at 256 images a step; scales with the batch."""
    warmup_epochs: float = 10.0
    """Epochs over which the learning rate rises."""
    weight_decay: float = 0.04
    """AdamW's weight decay; biases and norms have none."""
    teacher_momentum: float = 0.996
    """Momentum of the teacher's weights at the start; it rises to 1 along a cosine."""
    knn: str | None = None
    """Folder of class folders. Its k-NN accuracy (leave-one-out, at most 2,000 images) is logged as `knn`."""
    knn_epochs: int = 10
    """Epochs between two such measurements; the end is always measured."""
    seed: int = 0
    """Seed of everything random in the run."""
    run: RunConfig

    def __post_init__(self):
        if len(set(self.teacher_blocks)) < len(self.teacher_blocks):
            raise ValueError(f"--teacher-blocks must differ from each other, got {self.teacher_blocks}")
        if self.teacher is None and (self.encoder_mean or self.encoder_std):
            raise ValueError("--encoder-mean and --encoder-std are the teacher's; name it with --teacher, or drop them")
        if self.teacher_blocks and self.teacher is None:
            raise ValueError("--teacher-blocks needs the --teacher whose blocks they are")
        for name in () if self.teacher_blocks else ("size", "local_size") if self.teacher is None else ("size",):
            if getattr(self, name) % self.patch:
                raise ValueError(f"{name} must be a multiple of patch {self.patch}, got {getattr(self, name)}")
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim must be a multiple of heads {self.heads}, got {self.embed_dim}")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie in [0, 1), got {self.mask_ratio}")
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(
                f"epochs must not be negative and batch_size at least 1, got {self.epochs} and {self.batch_size}"
            )
        if self.knn_epochs < 1:
            raise ValueError(f"knn_epochs must be at least 1, got {self.knn_epochs}")

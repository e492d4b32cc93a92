"""Sizes of the Wan diffusion transformer, and the published ones by name."""

import dataclasses

import jax

from hfjax.models import checks, rope

_SIZES = (
  "dim", "ffn_dim", "heads", "layers", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WanConfig:
  """Architecture of the network; nothing here depends on the video's size.

  dim: model width, a multiple of `heads`. ffn_dim: hidden width of the feed-forward.
  in_dim, out_dim: latent channels. text_dim, text_len: width and rows of the text context.
  freq_dim: width of the timestep sinusoids. patch: rows and columns of latents in a token.
  image_dim: width of image embeddings for image-to-video models, 0 for none.
  linear: whether self-attention has the projection of the linear branch (hybrid models).

  Raises ValueError on sizes that do not fit together.
  """

  dim: int
  ffn_dim: int
  heads: int
  layers: int
  in_dim: int = 16
  out_dim: int = 16
  text_dim: int = 4096
  text_len: int = 512
  freq_dim: int = 256
  patch: tuple[int, int] = (2, 2)
  image_dim: int = 0
  linear: bool = False
  eps: float = 1e-6

  def __post_init__(self):
    checks.make_integers(self, *_SIZES, "image_dim")
    checks.make_patch(self)
    checks.check_number("eps", self.eps, 0, 1)
    for name in _SIZES:
      if getattr(self, name) < 1:
        raise ValueError(f"The model's {name} is {getattr(self, name)}; it must be at least 1.")
    if self.dim % self.heads:
      raise ValueError(
        f"The width of {self.dim} does not divide into {self.heads} heads; make it a "
        "multiple of the heads."
      )
    rope.check_head_dim(self.head_dim)
    if self.freq_dim % 2:
      raise ValueError(f"The timestep embedding is {self.freq_dim} wide; make freq_dim even.")

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.dim // self.heads


PRESETS = {
  "wan-1.3b": WanConfig(dim=1536, ffn_dim=8960, heads=12, layers=30),
  "wan-14b": WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40),
  "wan-i2v-14b": WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40, in_dim=36, image_dim=1280),
  "hybrid-1.3b": WanConfig(dim=1536, ffn_dim=8960, heads=12, layers=30, linear=True),
  "tiny": WanConfig(
    dim=64, ffn_dim=128, heads=2, layers=3, text_dim=48, text_len=16, freq_dim=32, linear=True
  ),
  # Of the model of the shapes world, which comes with hfjax.
  "shapes": WanConfig(
    dim=256, ffn_dim=896, heads=4, layers=6, text_dim=128, text_len=48, linear=True
  ),
}


def preset(name: str) -> WanConfig:
  """The named architecture; ValueError on an unknown name."""
  if name not in PRESETS:
    raise ValueError(f"Unknown model {name!r}; choose one of {', '.join(PRESETS)}.")
  return PRESETS[name]


jax.tree_util.register_static(WanConfig)

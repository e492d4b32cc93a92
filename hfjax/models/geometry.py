"""Sizes and semantics of streaming, from which every other size derives."""

import dataclasses
import math

import jax

from hfjax.models import checks


@dataclasses.dataclass(frozen=True)
class Variant:
  """Semantics of streaming attention: the default's, or a published code's with its quirks.

  Quirk numbers are those of spec section 12; released weights were trained with them.
  """

  name: str
  # Dense attention, no linear memory, absolute rotary positions (spec section 3). The window sees
  # the geometry's sink; the published one does so only if its cache is no longer than the window
  # (quirk 29), and corresponds to a sink of 0 otherwise.
  dense: bool = False
  # Feature map on the keys of the memory's numerator; else on its denominator only (quirk 4).
  map_memory_keys: bool = True
  # Feature map on the query of the memory's numerator; else on its denominator only (quirk 8).
  map_memory_query: bool = True
  # Sink frames enter the linear memory too, once they lie beyond the window (quirk 6).
  absorb_sink: bool = False
  # Keys of the first chunk are kept rotated, and sink keys are read as they lie (quirk 8).
  rotate_first_chunk: bool = False
  # What is subtracted from keys before pooling: nothing, or each token's mean over heads (quirk 1).
  center_blocks: str = "none"
  # Key blocks are cut separately in the past and the current keys; else over both in one row.
  split_blocks: bool = True


_HYBRID_REFERENCE = Variant(
  "reference_train",
  map_memory_keys=False,
  absorb_sink=True,
  center_blocks="heads",
  split_blocks=False,
)
VARIANTS = {
  v.name: v
  for v in (
    Variant("paper"),
    _HYBRID_REFERENCE,
    dataclasses.replace(
      _HYBRID_REFERENCE, name="reference_infer", map_memory_query=False, rotate_first_chunk=True
    ),
    Variant("reference_dense", dense=True),
  )
}


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Latent grid, chunk and window of a stream; frames are latent frames throughout.

  height, width: latent rows and columns (60 and 104 for 480 x 832 pixels).
  chunk: frames generated together.
  window: frames that attention sees, the current chunk included; -1: as many as `rope_cap`.
  sink: first frames of the stream, seen for ever.
  ratio: share of key blocks that each query block attends to; 1 is dense.
  rope_cap: frames over which rotary positions spread; a longer stream keeps the last ones.
  block: tokens in a query or key block.
  variant: a name in `VARIANTS`.

  Raises ValueError, with the numbers and the remedy, on combinations that cannot work.
  """

  height: int
  width: int
  chunk: int = 3
  window: int = 9
  sink: int = 3
  ratio: float = 0.2
  rope_cap: int = 21
  patch: tuple[int, int] = (2, 2)
  block: int = 64
  variant: str = "paper"

  def __post_init__(self):
    if self.variant not in VARIANTS:
      raise ValueError(f"Unknown variant {self.variant!r}; choose one of {', '.join(VARIANTS)}.")
    checks.make_integers(self, "height", "width", "chunk", "window", "sink", "rope_cap", "block")
    checks.make_patch(self)
    checks.check_grid(self.height, self.width, self.patch)
    if self.chunk < 1:
      raise ValueError(f"A chunk of {self.chunk} frames was asked for; it needs at least 1.")
    if self.sink < 0:
      raise ValueError(f"A sink of {self.sink} frames was asked for; use 0 for none.")
    if self.block < 1:
      raise ValueError(f"The attention block is {self.block} tokens; it needs at least 1.")
    if not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
      raise ValueError(
        f"The kept ratio of key blocks is {self.ratio}; it must lie in (0, 1], where 1 keeps all."
      )
    if self.rope_cap < 1:
      raise ValueError(f"The rotary cap is {self.rope_cap} frames; it must be at least 1.")
    if self.window == -1:
      object.__setattr__(self, "window", self.rope_cap)
    if self.window < self.sink + self.chunk:
      raise ValueError(
        f"The window of {self.window} frames cannot hold the sink of {self.sink} and a chunk of "
        f"{self.chunk}; make the window at least {self.sink + self.chunk}, or sink or chunk "
        "smaller."
      )
    if not self.semantics.dense and self.window > self.rope_cap:
      raise ValueError(
        f"The window of {self.window} frames is longer than the rotary cap of {self.rope_cap}; "
        f"make the window at most {self.rope_cap}, or raise rope_cap."
      )

  @property
  def semantics(self) -> Variant:
    """The variant's switches."""
    return VARIANTS[self.variant]

  @property
  def grid(self) -> tuple[int, int]:
    """Token rows and columns of a frame."""
    return self.height // self.patch[0], self.width // self.patch[1]

  @property
  def tokens(self) -> int:
    """Tokens in a frame."""
    return math.prod(self.grid)

  @property
  def previous(self) -> int:
    """Frames between the sink and the current chunk that attention sees, at most."""
    return self.window - self.sink - self.chunk

  @property
  def past(self) -> int:
    """Frames before the current chunk that attention sees, at most: sink and previous."""
    return self.sink + self.previous

  @property
  def sparse(self) -> bool:
    """Whether attention drops key blocks."""
    return not self.semantics.dense and self.ratio < 1

  def check_memory(self):
    """Raises ValueError if frames leaving the window would need negative rotary positions."""
    need = self.previous + 2 * self.chunk
    if not self.semantics.dense and need > self.rope_cap:
      raise ValueError(
        f"Frames that leave the window of {self.window} would lie before position 0: with a sink "
        f"of {self.sink} and chunks of {self.chunk}, the linear memory needs a rotary cap of at "
        f"least {need} frames, and it is {self.rope_cap}. Make the window smaller or the cap "
        "larger."
      )

  def num_chunks(self, frames: int) -> int:
    """Chunks that make up `frames`; ValueError unless they fill whole chunks."""
    if frames < 1 or frames % self.chunk:
      below = frames // self.chunk * self.chunk
      near = f"{below} or {below + self.chunk}" if below > 0 else f"{self.chunk}"
      raise ValueError(
        f"{frames} frames were asked for, which is no positive multiple of the chunk "
        f"of {self.chunk}; ask for {near}."
      )
    return frames // self.chunk

  def valid_keys(self, frames: int) -> list[int]:
    """Valid tokens among the past keys of a chunk of `frames`, by valid past frames.

    Among past and current keys together, where the variant cuts blocks over both.
    """
    current = 0 if self.semantics.split_blocks else frames * self.tokens
    return [past * self.tokens + current for past in range(self.past + 1)]


jax.tree_util.register_static(Geometry)

"""How published weights are meant to be sampled, by name; sizes of networks are in `presets`."""

import dataclasses
import re
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class SamplingPreset:
  """What samples a set of weights as it was trained or published to be.

  bidirectional: whole clips of `window` latent frames that see each other; else a stream.
  window, sink: latent frames that attention sees, and first ones that it always sees; chunks are 3.
  steps: few-step list that indexes the warped schedule (spec section 6.2); empty with a solver.
  solver, solver_steps: of undistilled weights, a name in `solvers.KINDS` and its evaluations.
  guidance: factor of classifier-free guidance, 1 for none. guidance_interval: times from and up to
    which there is guidance.
  shift: time shift of the schedule.
  variant: semantics, a name in `geometry.VARIANTS`; None: those that the weights record.
  size: columns and rows of pixels. block: tokens of an attention block. ratio: kept share of
    blocks. None: the usual ones.
  negative: prompt that guidance leads away from. None: a usual one.
  prompt: what is shown if nothing is asked for. None: something must be.
  world: the small world whose videos are all that the weights know, "shapes"; None: there is none.
  """

  window: int
  sink: int
  bidirectional: bool = False
  steps: tuple[float, ...] = (1000, 750, 500, 250)
  solver: str | None = None
  solver_steps: int = 0
  guidance: float = 1.0
  guidance_interval: tuple[float, float] = (0.0, 1000.0)
  shift: float = 5.0
  variant: str | None = None
  size: tuple[int, int] | None = None
  block: int | None = None
  ratio: float | None = None
  negative: str | None = None
  prompt: str | None = None
  world: str | None = None


_SHAPES = "a large red circle moves left while a small cyan star spins, on stripes"

SAMPLING_PRESETS = {
  # Hybrid Forcing (spec sections 1, 6.2 and 7.2).
  "hybrid": SamplingPreset(window=9, sink=3),
  # Self-Forcing's dense stream (spec sections 3, 6.2 and 7.2): attention sees 21 frames, and the
  # published code adds no sink to them.
  "self_forcing": SamplingPreset(window=21, sink=0, variant="reference_dense"),
  # LongLive's public configs/longlive_inference.yaml: local_attn_size 12, sink_size 3, the steps
  # warped, timestep_shift 5. Its cache is as long as the window, which therefore sees the sink.
  "longlive": SamplingPreset(window=12, sink=3, variant="reference_dense"),
  # Wan 2.1's text2video (spec section 6.4), for clips of 81 frames of video; the bidirectional
  # pipeline of section 7.4 differs in a shift of 8.
  "wan": SamplingPreset(
    window=21, sink=0, bidirectional=True, steps=(), solver="unipc", solver_steps=50, guidance=5.0
  ),
  # The model that comes with hfjax, of videos of its shapes world (hfjax/data/shapes.py): a window
  # is 36 blocks, of which 9 are kept.
  "shapes": SamplingPreset(
    window=9,
    sink=3,
    shift=3.0,
    size=(128, 128),
    block=16,
    ratio=0.25,
    prompt=_SHAPES,
    world="shapes",
  ),
  # The same before its hybrid stage: dense attention to as many frames as a clip of training has.
  "shapes_dense": SamplingPreset(
    window=21,
    sink=1,
    shift=3.0,
    variant="reference_dense",
    size=(128, 128),
    prompt=_SHAPES,
    world="shapes",
  ),
  # A causal teacher of it, which streams in many steps.
  "shapes_causal": SamplingPreset(
    window=21,
    sink=1,
    steps=(),
    solver="unipc",
    solver_steps=24,
    guidance=3.0,
    guidance_interval=(500.0, 1000.0),
    shift=3.0,
    variant="reference_dense",
    size=(128, 128),
    negative="",
    prompt=_SHAPES,
    world="shapes",
  ),
  # Its teacher, before distillation, which was taught with an empty prompt beside the captions.
  "shapes_teacher": SamplingPreset(
    window=21,
    sink=0,
    bidirectional=True,
    steps=(),
    solver="unipc",
    solver_steps=50,
    guidance=3.0,
    guidance_interval=(500.0, 1000.0),
    shift=3.0,
    size=(128, 128),
    negative="",
    prompt=_SHAPES,
    world="shapes",
  ),
}

# How people write the names of methods in those of files, folders and repositories.
_NAMED = {"longlive": r"long[-_ ]?live", "self_forcing": r"self[-_ ]?forcing"}


def infer(linear: bool, distilled: bool = True, names: Iterable[str] = ()) -> tuple[str, str]:
  """The preset that weights speak for, and why, as words that follow "as".

  linear: whether there is a linear branch. distilled: whether they are known to be a few-step
  model's, which tensors do not tell. names: of what they came from, more telling ones first.
  """
  if linear:
    return "hybrid", "the checkpoint has a linear branch"
  for name in names:
    for preset, pattern in _NAMED.items():
      if re.search(pattern, name, re.IGNORECASE):
        return preset, f"{name} is called so"
  if distilled:
    return "self_forcing", "the weights are those of a trainer of few-step models"
  return "wan", "nothing tells of distillation"

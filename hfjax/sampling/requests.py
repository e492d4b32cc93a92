"""What is to be made: prompts, lengths, sizes, and what a video begins with."""

import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from hfjax import pipeline
from hfjax.data import rows, shapes_words
from hfjax.data.rejects import DataError
from hfjax.models.sampling_presets import SAMPLING_PRESETS, SamplingPreset
from hfjax.sampling.flags import FLAGS, UsageError
from hfjax.streaming.stream import SIZE
from hfjax.video import read_image, read_video

_LONGEST = 10**7  # seconds of a video, a third of a year
CONTEXT_FRAMES = 81  # of --video, as long as the clips that models are trained on


def known() -> SamplingPreset | None:
  """The preset that flags or weights name; None if it takes the tensors to tell.

  No preset that is told from tensors has a size or a prompt. Weights of the Hub are downloaded.
  """
  name = FLAGS.preset or pipeline.recorded_preset(FLAGS.weights)
  return SAMPLING_PRESETS[name] if name else None


def prompts() -> list[str]:
  """Prompts of the command line, then of the file; the preset's if there are none."""
  found = list(FLAGS.prompt)
  if FLAGS.prompts_file is not None:
    found += read_prompts(Path(FLAGS.prompts_file).expanduser())
  elif not found and (preset := known()) and preset.prompt:
    found = [preset.prompt]
  if not found:
    raise UsageError('There is no prompt; say what the video shows, as in --prompt="a red square".')
  if any(not p.strip() for p in found):
    raise UsageError("A prompt is empty; say what the video shows.")
  return found


def read_prompts(path: Path) -> list[str]:
  """Prompts of a .jsonl or .csv file (`prompt`), or of any other, one a line.

  Raises UsageError, with the line, on what is no prompt.
  """

  def refuse(sentence: str):
    raise UsageError(sentence)

  try:
    return rows.read_prompts(path, refuse)
  except DataError as e:
    raise UsageError(str(e)) from e


def length(fps: Fraction, default: int | None) -> int | None:
  """Frames of each video; None without end. default: if no length is given, 0 for five seconds."""
  given = [n for n in ("seconds", "frames") if FLAGS[n].value is not None]
  given += ["endless"] * FLAGS.endless
  if len(given) > 1:
    raise UsageError(f"The length is given by {' and '.join(f'--{n}' for n in given)}; choose one.")
  if FLAGS.seconds is not None and not FLAGS.seconds <= _LONGEST:
    raise UsageError(f"The length is {FLAGS.seconds} seconds; give up to {_LONGEST}, or --endless.")
  if FLAGS.endless:
    return None
  if not given and default != 0:
    return default
  return FLAGS.frames or max(1, round((FLAGS.seconds or 5) * fps))


def rate() -> Fraction:
  """Frames per second."""
  try:
    fps = Fraction(FLAGS.fps)
  except (ValueError, ZeroDivisionError):
    fps = Fraction(0)
  if not 0 < fps <= 1000:
    raise UsageError(
      f"The frame rate is {FLAGS.fps!r}; give frames per second, such as 16 or 30000/1001."
    )
  return fps


def size() -> tuple[int, int]:
  """Columns and rows; the preset's if they are not given."""
  if FLAGS.size is None:
    preset = known()
    return (preset and preset.size) or SIZE
  match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", FLAGS.size)
  if match is None:
    raise UsageError(
      f"The size is {FLAGS.size!r}; give columns and rows of pixels, such as 832x480."
    )
  return int(match[1]), int(match[2])


def steps() -> int | tuple[float, ...] | None:
  """A number of steps, the steps themselves, or None if they are not given."""
  if FLAGS.steps is None:
    return None
  if not any(FLAGS.steps):
    raise UsageError("There are no --steps; give a number of them, or leave it out.")
  try:
    found = tuple(float(s) for s in FLAGS.steps)
  except ValueError as e:
    raise UsageError(
      f"The steps are {FLAGS.steps}; give a number of them, or them, as in 1000,750,500,250."
    ) from e
  # A step lies at 1000 or before, and a list begins there.
  if len(found) == 1 and found[0] < 1000:
    if found[0] < 1 or found[0] % 1:
      raise UsageError(f"{FLAGS.steps[0]} steps were asked for; give a whole number, from 1 on.")
    return int(found[0])
  return found


def beginning(columns_rows: tuple[int, int], fps: Fraction) -> tuple[np.ndarray | None, list[str]]:
  """Frames `[1 t y x 3]` that the videos begin with, and what was done to them."""
  if FLAGS.image is not None and FLAGS.video is not None:
    raise UsageError("There are --image and --video; begin with one of them.")
  if FLAGS.image is not None:
    return read_image(FLAGS.image, columns_rows)[None, None], []
  if FLAGS.video is not None:
    clip = read_video(FLAGS.video, columns_rows, fps, CONTEXT_FRAMES, from_end=True)
    whole = (len(clip.frames) - 1) // 4 * 4 + 1  # what fills latents, so that nothing is repeated
    return clip.frames[None, -whole:], clip.notes
  return None, []


def strange_words(preset: SamplingPreset, words: Iterable[str]) -> str | None:
  """A sentence if prompts are of another world than the only one that the weights know."""
  if preset.world is None:
    return None
  for prompt in words:
    try:
      shapes_words.read(prompt)
    except DataError:
      return (
        f"This model knows nothing but moving shapes, and may not follow {prompt[:80]!r}; write as "
        f"in --prompt={preset.prompt!r}."
      )
  return None


def exclusive(**given: Any):
  """Raises UsageError if more than one of these flags is set."""
  there = [f"--{name}" for name, value in given.items() if value]
  if len(there) > 1:
    raise UsageError(f"{' and '.join(there)} do not go together; leave one out.")

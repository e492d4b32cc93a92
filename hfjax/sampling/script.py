"""Scripts: which prompt a video follows from when on."""

from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hfjax.sampling.flags import UsageError, read_text, yaml_sentence

_KEYS = ("at", "chunk", "prompt", "blend", "share")


class Cue(NamedTuple):
  """A prompt and when it begins, by time or by chunk.

  at: seconds of the video, or None. chunk: number of a chunk from 0 on, or None.
  blend, share: see `Stream.set_prompt`.
  """

  at: Fraction | None
  chunk: int | None
  prompt: str
  blend: int = 0
  share: float = 0.0

  def is_due(self, frames: int, chunk: int, following: int, fps: Fraction) -> bool:
    """Whether it begins with the next chunk.

    frames, chunk: how many of both there are. following: frames of the next chunk. A time counts
    for the border between chunks that is nearest to it.
    """
    if self.chunk is not None:
      return chunk >= self.chunk
    assert self.at is not None
    return 2 * self.at * fps < 2 * frames + following


def read_script(path: Path) -> list[Cue]:
  """The cues of a YAML file; the first is at the beginning, and none comes before those above it.

      - prompt: a red square on a lawn
      - at: 4.5                # seconds
        prompt: a blue circle at night
        blend: 3               # chunks; 0, the default, is a hard change
      - chunk: 12
        prompt: a green triangle

  Raises UsageError, with the line, on what is no script.
  """
  text = read_text(path)
  try:
    root = yaml.compose(text, yaml.SafeLoader)
    entries = yaml.safe_load(text)
  except yaml.YAMLError as e:
    raise UsageError(yaml_sentence(path, e)) from e
  except (ValueError, RecursionError) as e:  # a date that is none, or thousands of brackets
    raise UsageError(f"{path} is no script: {e}.") from e
  if not isinstance(root, yaml.SequenceNode) or not entries:
    raise UsageError(f"{path} is no script; write a list of `- at: 5` with `prompt: ...` below.")
  cues: list[Cue] = []
  for node, entry in zip(root.value, entries, strict=True):
    try:
      cues.append(_cue(entry, first=not cues))
      _check_order(cues)
    except ValueError as e:
      raise UsageError(f"{path}, line {node.start_mark.line + 1}: {e}") from e
  return cues


def _cue(entry: Any, first: bool) -> Cue:
  if not isinstance(entry, dict):
    raise ValueError(f"{entry!r} is no entry; write `at: 5` and `prompt: ...`.")
  surplus = [str(k) for k in entry if k not in _KEYS]
  if surplus:
    raise ValueError(f"{surplus[0]!r} is unknown; there are {', '.join(_KEYS)}.")
  prompt = entry.get("prompt")
  if not isinstance(prompt, str) or not prompt.strip():
    raise ValueError(f"the prompt is {prompt!r}; say in words what the video shows.")
  at, chunk = entry.get("at"), entry.get("chunk")
  if at is not None and chunk is not None:
    raise ValueError("there are `at` and `chunk`; give one of them.")
  if at is None and chunk is None:
    if not first:
      raise ValueError("it does not say when; give `at` (seconds) or `chunk`.")
    chunk = 0
  if at is not None and not (_is_number(at) and 0 <= at < 1e9):
    raise ValueError(f"`at` is {at!r}; give seconds, 0 or more.")
  if chunk is not None and not (_is_whole(chunk) and chunk >= 0):
    raise ValueError(f"`chunk` is {chunk!r}; give a whole number, 0 or more.")
  if first and (at or chunk):
    raise ValueError("the video has no prompt before this; let the first entry begin at 0.")
  blend, share = entry.get("blend", 0), entry.get("share", 0.0)
  if not (_is_whole(blend) and blend >= 0):
    raise ValueError(f"`blend` is {blend!r}; give a number of chunks, 0 for a hard change.")
  if not (_is_number(share) and 0 <= share <= 1):
    raise ValueError(f"`share` is {share!r}; give a number from 0 to 1.")
  when = None if at is None else Fraction(at).limit_denominator(10**6)
  return Cue(when, chunk, prompt.strip(), blend, float(share))


def _check_order(cues: list[Cue]):
  for name in ("at", "chunk"):
    *earlier, last = [getattr(c, name) for c in cues]
    earlier = [x for x in earlier if x is not None]
    if last is not None and earlier and last <= earlier[-1]:
      raise ValueError(
        f"`{name}: {float(last):g}` is not after the `{name}: {float(earlier[-1]):g}` before it; "
        "put the entries in order."
      )


def _is_number(x: Any) -> bool:
  return isinstance(x, (int, float)) and not isinstance(x, bool) and x == x


def _is_whole(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)

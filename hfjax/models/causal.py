"""Which frames see which in causal training (spec section 3): plans for `wan.predict_flow`.

A plan lists spans of query frames with the spans of key frames that they see.
"""

from hfjax.models.attention import Span

Plan = tuple[tuple[Span, tuple[Span, ...]], ...]


def chunk_spans(frames: int, chunk: int, first_alone: bool = False) -> tuple[Span, ...]:
  """Spans of the chunks that make up a clip.

  first_alone: the first frame is a chunk of its own (image conditioning).
  Raises ValueError unless the frames fill whole chunks.
  """
  start = 1 if first_alone else 0
  if chunk < 1 or frames < 1 or (frames - start) % chunk:
    alone = " after a first frame of its own" if first_alone else ""
    raise ValueError(
      f"{frames} frames do not divide into chunks of {chunk}{alone}; give a number of "
      f"frames that is a multiple of {chunk}{' plus 1' if first_alone else ''}."
    )
  head: tuple[Span, ...] = ((0, 1),) if first_alone else ()
  return head + tuple((i, i + chunk) for i in range(start, frames, chunk))


def block_causal(frames: int, chunk: int, window: int = -1, first_alone: bool = False) -> Plan:
  """Each chunk sees itself and what precedes it, back to `window` frames before its own end.

  window: frames seen, the chunk itself included; -1 for all.
  Raises ValueError if the window is shorter than a chunk.
  """
  if window != -1 and window < chunk:
    raise ValueError(
      f"The window of {window} frames is shorter than a chunk of {chunk}; make it at "
      f"least {chunk}, or -1 for all frames."
    )
  return tuple(
    ((start, stop), ((0 if window == -1 else max(0, stop - window), stop),))
    for start, stop in chunk_spans(frames, chunk, first_alone)
  )


def teacher_forcing(frames: int, chunk: int) -> Plan:
  """For a clean clip followed by a noisy one: clean chunks see the clean past and themselves,
  noisy chunks see the clean past and their noisy selves.
  """
  spans = chunk_spans(frames, chunk)
  clean = tuple(((start, stop), ((0, stop),)) for start, stop in spans)
  noisy = tuple(
    ((frames + start, frames + stop), ((0, start), (frames + start, frames + stop))[start == 0 :])
    for start, stop in spans
  )
  return clean + noisy

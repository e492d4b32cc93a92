"""Scripts of prompts."""

import itertools
from fractions import Fraction

import pytest

from hfjax.sampling.flags import UsageError
from hfjax.sampling.script import Cue, read_script

FPS = Fraction(16)


def script(tmp_path, text):
  path = tmp_path / "story.yaml"
  path.write_text(text)
  return read_script(path)


def test_a_timeline_of_times_and_chunks(tmp_path):
  cues = script(
    tmp_path,
    "- prompt: a red square\n- at: 4.5\n  prompt: ' a blue circle '\n  blend: 3\n"
    "- {chunk: 12, prompt: c, share: 0.5}\n- {at: 9, prompt: d}\n",
  )
  assert cues == [
    Cue(None, 0, "a red square"),
    Cue(Fraction(9, 2), None, "a blue circle", 3),
    Cue(None, 12, "c", 0, 0.5),
    Cue(Fraction(9), None, "d"),
  ]


def test_a_prompt_begins_at_the_border_between_chunks_that_is_nearest():
  """Chunks of 12 frames after a first one of 9."""
  borders = [0, *range(9, 200, 12)]
  for seconds in (0, 0.2, 0.3, 1, 1.7, 5):
    cue = Cue(Fraction(seconds).limit_denominator(), None, "x")
    pairs = list(itertools.pairwise(borders))
    first = next(b for i, (b, c) in enumerate(pairs) if cue.is_due(b, i, c - b, FPS))
    assert abs(first - seconds * 16) == min(abs(b - seconds * 16) for b in borders)
  late = Cue(None, 3, "x")
  assert [late.is_due(0, i, 12, FPS) for i in range(5)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("", "is no script"),
    ("at: 5", "is no script"),
    ("- prompt: a\n- at: [1", "line 2, is no YAML|line 3, is no YAML"),
    ("- a red square", "line 1: 'a red square' is no entry"),
    ("- prompt: a\n- at: 5\n  promt: b", "line 2: 'promt' is unknown; there are at, chunk"),
    ("- prompt: a\n\n\n- at: 5\n  prompt: ' '", "line 4: the prompt is ' '"),
    ("- prompt: a\n- prompt: b", "line 2: it does not say when"),
    ("- {prompt: a, at: 0, chunk: 0}", "line 1: there are `at` and `chunk`"),
    ("- {prompt: a, at: 2}", "line 1: the video has no prompt before this"),
    ("- prompt: a\n- {prompt: b, at: -1}", "line 2: `at` is -1"),
    ("- prompt: a\n- {prompt: b, at: soon}", "line 2: `at` is 'soon'"),
    ("- prompt: a\n- {prompt: b, at: .nan}", "line 2: `at` is nan"),
    ("- prompt: a\n- {prompt: b, chunk: 1.5}", "line 2: `chunk` is 1.5"),
    ("- prompt: a\n- {prompt: b, at: 5}\n- {prompt: c, at: 5}", "line 3: `at: 5` is not after"),
    ("- prompt: a\n- {prompt: b, chunk: 5}\n- {prompt: c, chunk: 4}", "line 3: `chunk: 4` is not"),
    ("- {prompt: a, blend: -1}", "line 1: `blend` is -1"),
    ("- {prompt: a, share: 2}", "line 1: `share` is 2"),
    ("- {prompt: a, share: true}", "line 1: `share` is True"),
  ],
)
def test_scripts_that_make_no_sense(tmp_path, text, sentence):
  with pytest.raises(UsageError, match=sentence):
    script(tmp_path, text)

"""The model that comes with hfjax makes what it is told; its pixels are judged."""

import json

import numpy as np
import pytest

from hfjax import pipeline
from hfjax.data import shapes, shapes_score, shapes_words
from hfjax.models.sampling_presets import SAMPLING_PRESETS
from hfjax.streaming import Stream

MOST_BYTES = 20_000_000


def test_it_is_whole_and_small_and_says_what_it_is():
  files = [p for p in pipeline.EMBEDDED.rglob("*") if p.is_file()]
  assert sum(p.stat().st_size for p in files) <= MOST_BYTES
  preset = pipeline.recorded_preset(pipeline.EMBEDDED)
  assert SAMPLING_PRESETS[preset].world == "shapes"
  card = (pipeline.EMBEDDED / "README.md").read_text()
  for model in ("dit", "umt5", "vae"):
    about = json.loads((pipeline.EMBEDDED / model / "config.json").read_text())
    assert about and (pipeline.EMBEDDED / model / "model.safetensors").is_file()
    assert f"`{model}/`" in card
  shapes_words.read(SAMPLING_PRESETS[preset].prompt)


@pytest.mark.slow
def test_most_attributes_of_captions_that_it_was_not_taught_are_seen():
  """Eight colours, six shapes, nine motions and four backgrounds are not hit by chance."""
  prompts = shapes.prompts("held_out", 40, 77)
  model, videos = pipeline.load(), []
  for start in range(0, len(prompts), 20):
    stream = Stream(model, prompts[start : start + 20], seed=start)
    videos.append(np.concatenate([np.asarray(next(stream)) for _ in range(3)], axis=1))
  score = shapes_score.score(prompts, shapes_score.look(np.concatenate(videos)))
  shares = [right / score.total for right in score.attributes.values()]
  assert np.mean(shares) >= 0.75, score

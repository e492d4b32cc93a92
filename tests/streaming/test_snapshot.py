"""Streams that are saved and gone on with."""

import dataclasses

import jax
import numpy as np
import pytest

from hfjax.models.geometry import VARIANTS
from hfjax.streaming.latent_stream import LatentStream
from hfjax.streaming.snapshot import from_arrays, to_arrays
from tests.helpers import context, latents, random_params, stream_config

PARAMS = random_params()
SEEDS = [3, 8]


def begun(config):
  stream = LatentStream(config, PARAMS, context(2), seeds=SEEDS, kept=12)
  stream.extend(latents(config, 4, batch=2))
  for _ in range(4):
    next(stream)
  return stream


@pytest.mark.parametrize(
  ("variant", "dtype"), [*((v, "float32") for v in VARIANTS), ("paper", "bfloat16")]
)
def test_a_stream_goes_on_with_the_same_bits(variant, dtype):
  config = stream_config(variant=variant, dtype=dtype)
  stream = begun(config)
  stream.set_context(context(2, seed=7), blend=3)
  next(stream)  # so that it is saved in the middle of a change
  saved = to_arrays(stream)
  assert all(type(x) is np.ndarray for x in saved.values())
  again = from_arrays(config, PARAMS, saved)
  for _ in range(4):
    np.testing.assert_array_equal(next(stream), next(again))
  for s in (stream, again):
    s.set_context(context(2, seed=8), share=0.5)
  np.testing.assert_array_equal(next(stream), next(again))
  same = jax.tree.map(lambda x, y: np.array_equal(x, y), to_arrays(stream), to_arrays(again))
  assert all(same.values())


def test_what_is_saved_does_not_change_when_the_stream_goes_on():
  stream = begun(stream_config())
  saved = to_arrays(stream)
  copy = {k: v.copy() for k, v in saved.items()}
  for _ in range(3):
    next(stream)
  assert all(np.array_equal(saved[k], copy[k]) for k in copy)
  again = from_arrays(stream.config, PARAMS, saved)
  next(again)
  assert all(np.array_equal(saved[k], copy[k]) for k in copy)


def test_arrays_that_are_no_such_stream_are_refused():
  config = stream_config()
  saved = to_arrays(begun(config))
  other = dataclasses.replace(config, geometry=dataclasses.replace(config.geometry, window=12))
  with pytest.raises(ValueError, match=r"another configuration \(state/k is float32 \(2, 2, 9"):
    from_arrays(other, PARAMS, saved)
  with pytest.raises(ValueError, match="state/v is bfloat16"):
    from_arrays(config, PARAMS, to_arrays(begun(stream_config(dtype="bfloat16"))))
  with pytest.raises(ValueError, match="state/memory/kv has no place"):
    from_arrays(stream_config(variant="reference_dense"), PARAMS, saved)
  for missing in ("context", "history/total", "state/chunk"):
    with pytest.raises(ValueError, match=r"no number|another configuration|none of them"):
      from_arrays(config, PARAMS, {k: v for k, v in saved.items() if k != missing})

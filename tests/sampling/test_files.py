"""Saved streams and latents."""

import hashlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hfjax import pipeline
from hfjax.sampling.files import (
  LatentsWriter,
  SavedLatents,
  load_state,
  save_state,
  weights_hash,
)
from hfjax.video import VideoError


def test_a_state_comes_back_as_it_was(tmp_path):
  arrays = {
    "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "c": np.arange(4).astype(ml_dtypes.bfloat16),
    "d": np.array(7, np.int64),
  }
  path = tmp_path / "x.state.safetensors"
  save_state(path, arrays, {"left": None, "names": ["ü"]})
  got, about = load_state(path)
  assert about == {"left": None, "names": ["ü"]} and got.keys() == arrays.keys()
  for name, x in arrays.items():
    assert got[name].dtype == x.dtype
    np.testing.assert_array_equal(got[name], x)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_that_are_no_state_are_refused(tmp_path):
  path = tmp_path / "x.safetensors"
  with pytest.raises(VideoError, match="is not there"):
    load_state(path)
  save_file({"a": np.zeros(3)}, path)
  with pytest.raises(VideoError, match="is no state of a stream"):
    load_state(path)
  path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(VideoError, match="cannot be read"):
    load_state(path)
  save_state(path, {"a": np.arange(3), "b": np.zeros(4)}, {"left": 3})
  whole = path.read_bytes()
  for old, new in ((b'"b"', b'"c"'), (b"left", b"lift"), (whole[-1:], b"\x01")):
    at = whole.rindex(old)
    path.write_bytes(whole[:at] + new + whole[at + len(old) :])
    with pytest.raises(VideoError, match="cannot be read"):
      load_state(path)
  with pytest.raises(VideoError, match="cannot be written"):
    save_state(tmp_path / "none" / "x", {"a": np.zeros(3)}, {})


def test_latents_are_a_whole_file_after_every_chunk(tmp_path):
  path, r = tmp_path / "a.latents.safetensors", np.random.default_rng(0)
  pieces = [r.normal(size=(f, 4, 6, 16)).astype(np.float32) for f in (1, 3, 2)]
  with LatentsWriter(path, {"prompt": "a"}) as writer:
    for i, piece in enumerate(pieces):
      writer.write(piece)
      np.testing.assert_array_equal(load_file(path)["latents"], np.concatenate(pieces[: i + 1]))
  with LatentsWriter(tmp_path / "none", {"prompt": "x" * 9000}) as writer:
    writer.write(pieces[0])
  np.testing.assert_array_equal(load_file(tmp_path / "none")["latents"], pieces[0])
  with LatentsWriter(tmp_path / "empty", {}):
    pass
  assert not (tmp_path / "empty").exists()


@pytest.mark.slow
def test_saved_latents_are_decoded_as_they_were(tmp_path):
  a = pipeline.load_autoencoder("random:tiny", "full", "float32")
  latents = np.random.default_rng(0).normal(size=(7, 4, 8, 16)).astype(np.float32)
  save_file({"latents": latents}, tmp_path / "a")
  source = SavedLatents(tmp_path / "a").begin(a)
  frames = np.concatenate([np.asarray(x) for x in source], axis=1)
  assert frames.shape == (1, 25, 32, 64, 3) and source.frames == 25
  whole = pipeline.AUTOENCODERS["full"][1].decode(a.config, a.params, jnp.asarray(latents)[None])
  want = np.clip(np.round((np.asarray(whole) + 1) * 127.5), 0, 255)
  assert np.abs(frames - want).max() <= 1
  save_file({"latents": latents[..., :5]}, tmp_path / "b")
  with pytest.raises(VideoError, match="5 channels, and the autoencoder takes 16"):
    SavedLatents(tmp_path / "b").begin(a)


def test_a_full_disk_keeps_the_latents_that_are_there(tmp_path, monkeypatch):
  path, piece = tmp_path / "a", np.ones((2, 4, 6, 16), np.float32)
  with LatentsWriter(path, {}) as writer:
    writer.write(piece)

    def put(at, data, real=writer._put):
      real(at, data[: len(data) // 2])
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_put", put)
    with pytest.raises(VideoError, match="the latents before are kept"):
      writer.write(2 * piece)
  np.testing.assert_array_equal(load_file(path)["latents"], piece)
  # A process that is killed within a write leaves a tail.
  path.write_bytes(path.read_bytes() + b"tail")
  assert SavedLatents(path).shape == piece.shape
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(VideoError, match="is cut off"):
    SavedLatents(path)


@pytest.mark.parametrize(
  ("arrays", "sentence"),
  [
    ({"x": np.zeros((1, 2, 2, 4), np.float32)}, "holds no latents"),
    ({"latents": np.zeros((2, 2, 4), np.float32)}, r"shape \[2, 2, 4\]"),
    ({"latents": np.zeros((1, 2, 2, 4))}, "holds F64 latents"),
  ],
)
def test_files_that_hold_no_latents_are_refused(tmp_path, arrays, sentence):
  save_file(arrays, tmp_path / "a")
  with pytest.raises(VideoError, match=sentence):
    SavedLatents(tmp_path / "a")
  with pytest.raises(VideoError, match="is not there"):
    SavedLatents(tmp_path / "b")


def test_weights_of_other_formats_are_hashed_by_what_they_hold(tmp_path):
  assert weights_hash("random:tiny") is None
  (tmp_path / "a.safetensors").write_bytes(b"one")
  (tmp_path / "notes.txt").write_bytes(b"not weights")
  line = f"a.safetensors {hashlib.sha256(b'one').hexdigest()}"
  assert weights_hash(str(tmp_path)) == hashlib.sha256(line.encode()).hexdigest()

"""Files beside a video: the state of its stream, its latents, and what they say of the weights."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError, numpy, safe_open

from hfjax import convert
from hfjax.convert import stored
from hfjax.streaming.pixels import Autoencoder, FrameDecoder
from hfjax.video import VideoError

_STATE, _LATENTS = "hfjax stream 1", "hfjax latents 1"
_HEADER = 4096  # bytes that the header of a file of latents has, so that it can grow in place


def save_state(path: Path, state: dict[str, np.ndarray], about: dict[str, Any]):
  """Writes a stream's state and what else is to be known of it; all of the file, or nothing.

  Raises VideoError if it cannot be written.
  """
  part, text = path.with_name(f".{os.getpid()}.part"), json.dumps(about)
  noted = {"format": _STATE, "about": text, "sha256": _digest(state, text)}
  try:
    numpy.save_file(state, part, noted)
    os.replace(part, path)
  except (OSError, SafetensorError) as e:
    why = getattr(e, "strerror", None) or e
    raise VideoError(f"{path} cannot be written ({why}); the stream's state is lost.") from e
  finally:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)


def load_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """What `save_state` was given; VideoError if the file holds no such thing."""
  if not path.is_file():
    raise VideoError(f"{path} is not there; give the .state.safetensors file of a stopped video.")
  try:
    with safe_open(path, "numpy") as file:
      noted = file.metadata() or {}
      if noted.get("format") != _STATE:
        raise VideoError(f"{path} is no state of a stream; give what --resume was promised.")
      state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(state, noted["about"]) != noted["sha256"]:
      raise ValueError("its hash is another")
    return state, json.loads(noted["about"])
  except (OSError, SafetensorError, ValueError, KeyError) as e:
    if isinstance(e, VideoError):
      raise
    raise VideoError(f"{path} cannot be read ({e}); it is damaged or no state.") from e


def _digest(state: dict[str, np.ndarray], about: str) -> str:
  """SHA-256 of all that a file of a stream says."""
  digest = hashlib.sha256(about.encode())
  for name, x in sorted(state.items()):
    digest.update(f"{name} {x.dtype} {x.shape}".encode())
    digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


class LatentsWriter:
  """Writes the latents of one video, `[f y x z]` in float32, to a safetensors file that grows.

  After every call of `write` the file is whole, also if it fails; a process that is killed within
  one may leave more than the header tells of, which `SavedLatents` does not mind. Memory is
  constant at any length.
  about: words for the header, which may change from call to call.
  """

  def __init__(self, path: Path, about: dict[str, str]):
    self.path, self.about, self.frames = path, about, 0
    try:
      self._file = path.open("wb", buffering=0)
    except OSError as e:
      raise VideoError(f"{path} cannot be written ({e.strerror}).") from e

  def write(self, latents: Float[np.ndarray, "f y x z"]):
    """Appends latents; VideoError when the disk takes no more."""
    data = np.ascontiguousarray(latents, np.float32)
    end = _HEADER + self.frames * data[0].nbytes
    try:
      self._put(end, data.tobytes())
      self._put(0, self._header((self.frames + len(data), *data.shape[1:])))
    except OSError as e:
      self._file.truncate(end if self.frames else 0)
      raise VideoError(
        f"{self.path} cannot be written ({e.strerror}); the latents before are kept."
      ) from e
    self.frames += len(data)

  def _put(self, at: int, data: bytes):
    self._file.seek(at)
    rest = memoryview(data)
    while rest:
      rest = rest[self._file.write(rest) :]

  def _header(self, shape: tuple[int, ...]) -> bytes:
    entry = {
      "dtype": "F32",
      "shape": shape,
      "data_offsets": [0, 4 * int(np.prod(shape, dtype=np.int64))],
    }
    info = {"__metadata__": {"format": _LATENTS, **self.about}, "latents": entry}
    text = json.dumps(info).encode()
    room = _HEADER - 8
    if len(text) > room:  # a very long prompt
      return self._header_without_words(shape)
    return room.to_bytes(8, "little") + text.ljust(room)

  def _header_without_words(self, shape: tuple[int, ...]) -> bytes:
    self.about = {}
    return self._header(shape)

  def close(self):
    """Ends the file, which is removed if it is empty."""
    self._file.close()
    if not self.frames:
      self.path.unlink(missing_ok=True)

  def __enter__(self) -> "LatentsWriter":
    return self

  def __exit__(self, *exception):
    self.close()


class SavedLatents:
  """The frames of a file of latents, decoded piece by piece.

  about: words of the header. frames: how many have been given out.
  """

  def __init__(self, path: Path, piece: int = 3):
    """Opens the file; VideoError if it holds no latents. piece: latent frames decoded at once."""
    if not path.is_file():
      raise VideoError(f"{path} is not there; give a file that --latents=save wrote.")
    try:
      with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 2**24)))
      entry, self.about = header["latents"], header.get("__metadata__", {})
      shape, dtype = entry["shape"], entry["dtype"]
      self._data = 8 + length + entry["data_offsets"][0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
      raise VideoError(f"{path} holds no latents ({e!r}); give what --latents=save wrote.") from e
    if len(shape) != 4 or dtype != "F32" or not all(shape):
      raise VideoError(
        f"{path} holds {dtype} latents of shape {shape}; give F32 [frames, rows, columns, "
        "channels]."
      )
    if self._data + 4 * int(np.prod(shape, dtype=np.int64)) > path.stat().st_size:
      raise VideoError(f"{path} is cut off; copy it anew.")
    self.path, self.shape, self.piece, self.frames = path, tuple(shape), piece, 0
    self._next = 0
    self._decoder: FrameDecoder | None = None
    self.chunk: Array | None = None

  def begin(self, autoencoder: Autoencoder) -> "SavedLatents":
    """Ready to be iterated over; VideoError if the latents are another autoencoder's."""
    z = autoencoder.config.z_dim
    if self.shape[3] != z:
      raise VideoError(
        f"{self.path} holds latents of {self.shape[3]} channels, and the autoencoder takes {z}; "
        "take the weights that made them."
      )
    self._decoder = FrameDecoder(autoencoder)
    return self

  def __iter__(self) -> Iterator[UInt8[Array, "b t y x 3"]]:
    return self

  def __next__(self) -> UInt8[Array, "b t y x 3"]:
    if self._next >= self.shape[0] or self._decoder is None:
      raise StopIteration
    end = min(self._next + self.piece, self.shape[0])
    mapped = np.memmap(self.path, "<f4", "r", self._data, self.shape)
    self.chunk = jnp.asarray(np.array(mapped[self._next : end]))[None]
    self._next = end
    frames = self._decoder(self.chunk)
    self.frames += frames.shape[1]
    return frames


def weights_hash(weights: str) -> str | None:
  """One SHA-256 of all models of a folder; None of random weights.

  Of an hfjax folder by the hashes that it records, else by reading every file of weights.
  """
  if weights.startswith("random:"):
    return None
  path = convert.locate(weights)
  ours = stored.hfjax_models(path)
  if ours:
    parts = [f"{name} {stored.folder_hash(folder)}" for name, folder in sorted(ours.items())]
  else:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_weights(p))
    parts = []
    for file in files:
      with file.open("rb") as f:
        parts.append(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}")
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_weights(path: Path) -> bool:
  return path.is_file() and path.suffix in (".safetensors", ".pt", ".pth", ".bin")

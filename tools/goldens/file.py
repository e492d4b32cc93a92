"""One golden file: its arrays, its configuration, and the verdicts on what was computed anew."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from hfjax.convert import dit

# What the folder's README allows.
MAGNITUDE = 1e-6  # schedule: share of the array's largest magnitude
EMBEDDING = 1e-5
SPARSE = 1e-5
FORWARD = 2e-5
ROLLOUT = 5e-5
STATE = 2e-5
LOSS = 1e-5  # share of the largest magnitude
AUTOENCODER = 2e-5
GRADIENT = 2e-5  # share of the array's norm
INFORMATION = ("min_topk_margin", "kept_fraction", "cache_local_global_end")


class UnreadableError(Exception):
  """A sentence for the user; exit status 2."""


class Row(NamedTuple):
  array: str
  error: float | None
  allowed: float | None
  verdict: str


class Golden:
  """One file, and a tally of which of its outputs have been compared."""

  def __init__(self, path: Path):
    self.name = path.stem
    try:
      with np.load(path, allow_pickle=False) as file:
        self.arrays = {k: file[k] for k in file.files}
      self.cfg: dict[str, Any] = dict(json.loads(str(self.arrays.pop("cfg"))))
    except Exception as e:
      raise UnreadableError(
        f"{path} is no golden file that can be read ({e}); make it anew, in the format "
        "of the goldens' README."
      ) from e
    self.compared: set[str] = set()

  def __getitem__(self, key: str) -> np.ndarray:
    if key not in self.arrays:
      raise UnreadableError(
        f"{self.name} lacks the array {key}, which this case needs; make the file anew."
      )
    return self.arrays[key]

  def has(self, key: str) -> bool:
    return key in self.arrays

  def setting(self, key: str) -> Any:
    if key not in self.cfg:
      raise UnreadableError(
        f"{self.name} lacks {key} in cfg, which this case needs; make the file anew."
      )
    return self.cfg[key]

  def params(self) -> dict[str, np.ndarray]:
    return {k.removeprefix("param/"): v for k, v in self.arrays.items() if k.startswith("param/")}

  def close(self, key: str, got: Any, allowed: float) -> Iterator[Row]:
    """Largest absolute difference against `allowed`."""
    yield from self._judge(key, got, lambda g, w: (np.abs(g - w).max(initial=0), allowed))

  def close_to_magnitude(self, key: str, got: Any, share: float = MAGNITUDE) -> Iterator[Row]:
    """Largest absolute difference against a share of the array's largest magnitude."""
    yield from self._judge(
      key, got, lambda g, w: (np.abs(g - w).max(initial=0), share * np.abs(w).max(initial=0))
    )

  def close_to_norm(self, key: str, got: Any) -> Iterator[Row]:
    """Norm of the difference over the array's norm."""
    yield from self._judge(
      key, got, lambda g, w: (np.linalg.norm(g - w) / np.linalg.norm(w), GRADIENT)
    )

  def equal(self, key: str, got: Any) -> Iterator[Row]:
    """Equal to the last bit."""
    yield from self._judge(key, got, lambda g, w: (np.abs(g - w).max(initial=0), 0))

  def _judge(self, key, got, measure) -> Iterator[Row]:
    if not self.has(key):  # a file may leave outputs out
      return
    self.compared.add(key)
    if self.arrays[key].dtype.kind not in "fiub":
      raise UnreadableError(f"{self.name} holds {key} as {self.arrays[key].dtype}; give numbers.")
    got, want = np.asarray(got, np.float64), self.arrays[key].astype(np.float64)
    if got.shape != want.shape:
      raise UnreadableError(
        f"{self.name} holds {key} of shape {want.shape}, and its configuration gives "
        f"{got.shape}; make the file anew."
      )
    error, allowed = measure(got, want)
    finite = np.isfinite(got).all() and np.isfinite(want).all()
    yield Row(
      key.removeprefix("out/"),
      float(error),
      float(allowed),
      "ok" if finite and error <= allowed else "FAIL",
    )

  def rest(self) -> Iterator[Row]:
    """Outputs that no comparison asked for."""
    for key in self.arrays:
      if key.startswith("out/") and key not in self.compared:
        verdict = "information" if key.rpartition("/")[2] in INFORMATION else "not covered"
        yield Row(key.removeprefix("out/"), None, None, verdict)


# Latents there are [.. frames, channels, rows, columns], here [.. frames, rows, columns, channels].
def ours(x: np.ndarray) -> jax.Array:
  return jnp.asarray(np.moveaxis(x, -3, -1))


def theirs(x: Any) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)


def pairs_to_halves(x: Any) -> np.ndarray:
  """Channels of rotary pairs, from neighbours (theirs) to halves (ours)."""
  return rearrange(np.asarray(x), "... (pair two) -> ... (two pair)", two=2)


def halves_to_pairs(x: Any) -> np.ndarray:
  return rearrange(np.asarray(x), "... (two pair) -> ... (pair two)", two=2)


def model(g: Golden) -> tuple[Any, Any]:
  """Architecture and parameters of a file."""
  tensors = g.params()
  config = dit.config_from_original(g.cfg, any("linear_proj" in k for k in tensors))
  return config, jax.tree.map(jnp.asarray, dit.from_original(config, tensors))

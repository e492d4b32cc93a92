"""Trajectories from the LMDB folders of other trainers (spec section 8.10)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfjax.data import shards
from hfjax.data.rejects import DataError
from hfjax.diffusion.schedule import FlowSchedule


class _Pairs:
  """One LMDB: prompts, and latents as rows of float16 `[s f c y x]`."""

  def __init__(self, path: Path):
    try:
      import lmdb
    except ImportError as e:
      raise DataError(
        "Reading LMDB needs the package lmdb, which is not installed; install it with "
        "`pip install lmdb`."
      ) from e
    self.path = path
    try:
      self._db = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=8)
    except lmdb.Error as e:
      raise DataError(f"{path} is no LMDB that can be read ({e}).") from e
    self.count, *row = self._sizes("latents")
    if self._sizes("prompts")[0] != self.count:
      raise DataError(
        f"{path} has {self.count} latents and {self._sizes('prompts')[0]} prompts; there must be "
        "as many."
      )
    # Rows of four sizes are clips, whose axis of states is left out.
    self.row = (1, *row) if len(row) == 4 else tuple(row)
    if len(self.row) != 5 or min(self.row) < 1 or self.count < 1:
      raise DataError(f"The latents in {path} have shape {(self.count, *row)}; 6 axes are needed.")

  def _get(self, key: str) -> bytes | None:
    with self._db.begin() as transaction:
      return transaction.get(key.encode())

  def _sizes(self, name: str) -> list[int]:
    try:
      found = [int(n) for n in (self._get(f"{name}_shape") or b"").split()]
    except ValueError:
      found = []
    if not found:
      raise DataError(f"{self.path} does not say the shape of its {name}; give LMDB of ODE pairs.")
    return found

  def read(self, row: int) -> tuple[str, np.ndarray]:
    """Prompt, and states `[s f y x c]`; DataError if they are damaged."""
    name = f"Row {row} of {self.path}"
    latents, prompt = self._get(f"latents_{row}_data"), self._get(f"prompts_{row}_data")
    try:
      text = (prompt or b"").decode()
    except UnicodeDecodeError as e:
      raise DataError(f"{name} has a prompt that is no UTF-8 text.") from e
    if not text.strip():
      raise DataError(f"{name} has no prompt.")
    want = 2 * int(np.prod(self.row))
    if latents is None or len(latents) != want:
      raise DataError(f"{name} has {len(latents or b'')} bytes of latents, and {want} are needed.")
    array = np.frombuffer(latents, np.float16).reshape(self.row)
    if not np.all(np.isfinite(array)):
      raise DataError(f"{name} has latents that are not finite.")
    return text, np.moveaxis(array, 2, -1)


def write(
  folder: str | Path,
  path: str | Path,
  *,
  steps: Sequence[float] = (1000, 750, 500, 250),
  shift: float = 5.0,
  per_shard: int = 0,
  command: str = "",
  **options: Any,
) -> shards.Written:
  """Writes the trajectories of an LMDB, or of a folder of several, in the order of their names.

  steps, shift: denoising steps at which the states are, as in `trajectories.Recipe`; LMDB does not
    say them. options: see `shards.write`, whose errors are raised.

  Raises DataError if there is no LMDB, if several do not fit together, and if lmdb is missing.
  """
  path = Path(path).expanduser()
  is_one = (path / "data.mdb").is_file()
  found = [path] if is_one else sorted(p.parent for p in path.glob("*/data.mdb"))
  if not found:
    raise DataError(f"{path} holds no LMDB (data.mdb), and no folders of it; give another.")
  parts = [_Pairs(p) for p in found]
  rows = {part.row for part in parts}
  if len(rows) > 1:
    raise DataError(f"The LMDBs in {path} have latents of different shapes: {sorted(rows)}.")
  s, f, c, y, x = rows.pop()
  if s != len(steps) + 1:
    raise DataError(
      f"{path} holds {s} states a trajectory, and {len(steps)} denoising steps and the clean end "
      f"make {len(steps) + 1}; give the steps that its teacher was asked for."
    )
  try:
    times = (*FlowSchedule(shift).warp(steps), 0.0)
  except ValueError as e:
    raise DataError(str(e)) from e
  places = [(part, row) for part in parts for row in range(part.count)]
  about = {"steps": [*map(float, steps)], "shift": shift, "times": times}
  about["imported"] = [[part.path.name, part.count] for part in parts]
  plan = shards.Plan(
    "trajectories", len(places), {"trajectory": ((s, f, y, x, c), "float16")}, about, per_shard,
    command,
  )  # fmt: skip

  def make(start: int, stop: int, reject) -> Iterable[shards.Example]:
    for part, row in places[start:stop]:
      try:
        prompt, states = part.read(row)
      except DataError as e:
        reject(str(e))
      else:
        yield {"prompt": prompt, "trajectory": states}

  return shards.write(folder, plan, make, **options)

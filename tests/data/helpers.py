"""LMDB as trainers of students write them."""

import lmdb
import numpy as np


def write_lmdb(path, latents, prompts, bad=None):
  path.mkdir(parents=True)
  with lmdb.open(str(path), map_size=2**20) as db, db.begin(write=True) as transaction:
    put = lambda key, value: transaction.put(key.encode(), value)
    put("latents_shape", " ".join(map(str, latents.shape)).encode())
    put("prompts_shape", str(len(prompts)).encode())
    for i, (x, prompt) in enumerate(zip(latents, prompts, strict=True)):
      put(f"latents_{i}_data", x.tobytes())
      put(f"prompts_{i}_data", prompt.encode())
    for key, value in (bad or {}).items():
      put(key, value)


def states(count, shape=(3, 2, 4, 2, 3), seed=0):
  draws = np.random.default_rng(seed).standard_normal((count, *shape))
  return draws.astype(np.float16)

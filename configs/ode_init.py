r"""Stage `ode`: the student learns to take few steps, causally, from trajectories of the teacher.

    python tools/make_trajectories.py --weights weights/wan-14b --prompts prompts.txt \
        --out data/trajectories
    python -m hfjax.train --config=configs/ode_init.py --workdir=runs/ode \
        --config.data.path=data/trajectories

Instead, trajectories of Self-Forcing are taken with `tools/make_trajectories.py --import_lmdb`, and
published weights after this stage (ode_init.pt) by the converter. --dry_run tells what memory a
step takes. It was not yet run at full size.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import default_config


def get_config() -> ConfigDict:
  c = default_config()
  c.stage = "ode"
  c.steps = 3000
  c.batch = 8
  c.accumulate = 8
  c.optimizer.rate = 2e-6
  c.optimizer.b1 = 0.9
  c.ema.decay = 0.0
  c.checkpoint.every = 500
  c.validation.every = 500
  return c

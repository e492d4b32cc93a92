r"""Stage `hybrid` of the shapes world: linear memory and block-sparse attention.

python -m hfjax.train --config=configs/tiny_stage2.py --workdir=runs/tiny_stage2 \
        --config.init=weights/stage1 --config.data.path=data/trajectories
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = runpy.run_path(str(Path(__file__).with_name("tiny_stage1.py")))["get_config"]()
  c.stage = "hybrid"
  c.init = "weights/stage1"
  c.student.linear = True
  c.geometry.variant = "paper"
  c.geometry.window = 9
  c.geometry.sink = 3
  c.geometry.ratio = 0.25
  c.distill.most = 18
  c.distill.decoded = 2  # more of the past changes a frame hardly, and takes most of the time
  # No reflow: its target is another clip than what goes on from the student's own past.
  return c

r"""Stage `dmd`: self-forcing distribution matching under dense attention (spec section 8, stage 1).

    python -m hfjax.train --config=configs/stage1.py --workdir=runs/stage1 \
        --config.init=runs/ode --config.data.path=prompts.txt

Student and critic are Wan 2.1 1.3B, the teacher is the 14B. On one H200, one sample at a time: 93 GB
for a critic step and 104 GB for the student's, without the text encoder (11 GB; embed the prompts
with tools/embed_prompts.py, or set text.device=cpu). benchmarks/training.md has times of steps and
what was measured. Published: about 1000 steps on 64 GPUs.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import default_config


def get_config() -> ConfigDict:
  c = default_config()
  c.stage = "dmd"
  c.steps = 1000
  c.data.path = "data/prompts"
  return c

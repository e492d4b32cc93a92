r"""Stage `dmd`: self-forcing distribution matching under dense attention (spec section 8, stage 1).

    python -m hfjax.train --config=configs/stage1.py --workdir=runs/stage1 \
        --config.init=runs/ode --config.data.path=prompts.txt --config.text.device=cpu

Student and critic are Wan 2.1 1.3B, the teacher is the 14B. One sample at a time on one H200:
benchmarks/training.md has memory and times of steps. There is no room for the text encoder (11 GB)
beside them: it works on the host, or not at all with prompts of tools/embed_prompts.py. Published:
about 1000 steps on 64 GPUs.
"""

from ml_collections import ConfigDict

from hfjax.training.defaults import default_config


def get_config() -> ConfigDict:
  c = default_config()
  c.stage = "dmd"
  c.steps = 1000
  c.data.path = "data/prompts"
  return c

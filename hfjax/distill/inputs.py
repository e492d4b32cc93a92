"""What objectives are given beside parameters and data, and what they tell of their losses."""

from typing import NamedTuple

from jaxtyping import Array, Float

Figures = dict[str, Array]


class Texts(NamedTuple):
  """Encoded prompts of a batch, and the negative prompt, all of full length."""

  context: Float[Array, "b t w"]
  negative: Float[Array, "one t w"]

"""What drivers know of a method: its settings as far as they concern a whole run, and its grids."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from fqjax.drivers.settings import Allocation, Nearest, Rounding
from fqjax.runtime.settings import Settings

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from fqjax.core.formats.uniform import Grid
    from fqjax.core.layer import LayerInputs


class Layout(NamedTuple):
    """How a method stores a layer and its input, before anything is known of the layer.

    Attributes:
      activation_bits: 4 or 8; 16 for activations in floating point.
      token_scales: whether activations have a scale for every token; else one fixed scale.
      channel_scales: whether a weight has a scale for every output channel; else one for the tensor, or for every group.
      group_size: input channels that share a scale; 0 for no groups.
      group_scales: of groups: "float", "integer", or "folded" for integers that are multiplied into the codes.
      group_scale_bytes: of the scale of a group.
    """

    activation_bits: int
    token_scales: bool = False
    channel_scales: bool = False
    group_size: int = 0
    group_scales: Literal["float", "integer", "folded"] = "float"
    group_scale_bytes: int = 4


class Method(Settings):
    """Base of the methods: a paper's settings, and what follows from them.

    A method is a frozen dataclass, registered by its ``kind``.  Its fields are what ``--set`` sees.  Drivers read the
    attributes below, which are fields where a method leaves a choice.

    Attributes:
      allocation: division of bits among layers.
      equalize: whether output channels are rescaled along the model's paths first (:mod:`fqjax.rewrites.equalize`).
      rounding: of the weights.
      activation_percentile: of a channel's magnitudes in the rows kept by calibration, which counts as its largest, from
        50 to 100; less than 100 lets single extreme tokens be clipped.  At 100 it is the largest of all rows that passed.
      max_expansion: most that a layer's K'/K may be, at least 1.
      shares_inputs: whether layers that read the same input have to be looked at together to quantize it alike for them.
        Where every token has a scale of its own, and nothing is smoothed, they need not.
      integer_amplifier: most that float scales of groups are multiplied with, once the weights are rounded, to become
        integers; None leaves them.
      naive: whether nothing makes up for the errors of rounding, neither smoothing nor flattening nor GPTQ nor AWQ.
    """

    group: ClassVar[str] = "methods"
    kind: ClassVar[str]

    allocation: Allocation = Allocation()
    equalize: bool = False
    rounding: Rounding = Nearest()
    activation_percentile: float = 100.0
    max_expansion: float = 1.0
    shares_inputs: bool = True
    integer_amplifier: int | None = None
    naive: bool = False

    def layout(self, bits: int) -> Layout:
        """How a layer whose weight has so many bits is stored."""
        raise NotImplementedError

    def grids(self, layer: "LayerInputs", bits: int, budgets: "Float[Array, ' b']") -> "Callable[[Array], Grid]":
        """The grids of a layer.

        Args:
          layer: weight and statistics of the input.
          bits: of the weight.
          budgets: bounds on K'/K.

        Returns:
          A function that gives, for the i-th bound, the numbers that activations and weights may become.  All of it is
          jitted, i is traced.
        """
        raise NotImplementedError

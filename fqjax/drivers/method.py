"""The interface of a method to the drivers: its settings as far as they concern a whole run, and the plans of a layer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Protocol

from fqjax.drivers.settings import Allocation, Nearest, Rounding
from fqjax.runtime.settings import Settings

if TYPE_CHECKING:
    from fqjax.core.formats.base import Format
    from fqjax.core.layer import LayerInputs, LayerPlan
    from fqjax.core.stored_inputs import StoredInput
    from fqjax.layers.linear import QuantizedLinear


class NamedPass(Protocol):
    """A pass (:class:`fqjax.drivers.base.Pass`)."""

    name: ClassVar[str]


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
      max_expansion: most that a layer's K'/K may be; 1 where nothing is flattened.
      shares_inputs: whether layers that read the same input have to be looked at together to quantize it alike for them.
        Where every token has a scale of its own, and nothing is smoothed, they need not.
      flattens: whether channels may be flattened, which other tools' formats cannot express.
      smooths: whether channels of inputs are divided by factors, which other tools' formats know only folded into what
        stands in front of a layer (:mod:`fqjax.rewrites.fold`).
      coarse_activations: whether activations of layers with 4-bit weights have 4 bits.
      data_free: whether a model can be quantized without calibration data, by its weights alone.
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
    data_free: bool = False
    naive: bool = False
    flattens: bool = False
    smooths: bool = False
    coarse_activations: bool = False

    def formats(self, bits: int) -> "tuple[Format, type[StoredInput]]":
        """Stored types of a layer whose weight has so many bits: the weight's format, and the quantizer of its input."""
        raise NotImplementedError

    def plans(self, layer: "LayerInputs", bits: int) -> "Iterable[LayerPlan]":
        """The ways in which a layer can be quantized with so many bits, alike but for the numbers in their arrays.

        Args:
          layer: weight and statistics of the input.
          bits: of the weight.

        All of it is jitted.
        """
        raise NotImplementedError

    def passes(self) -> "Iterable[NamedPass] | None":
        """The passes over the blocks that quantize a model; None for the usual ones
        (:func:`fqjax.drivers.pipeline.usual_passes`).
        """
        return None

    def finished(self, layer: "QuantizedLinear") -> "QuantizedLinear":
        """A quantized layer as the method leaves it, or the layer itself."""
        return layer

"""Changes of a layer's input and weight that leave their product as it was.

A transform T turns inputs x into ``T.inputs(x)`` and a weight W into ``T.weight(W)`` so that

    T.inputs(x) @ T.weight(W).T + T.bias(W, b) = x @ W.T + b.

The weight's side is done once, before it is rounded; the inputs' side runs with the model.  Where one kernel pass can do that
together with the quantization, :meth:`Transform.recipe` says how, and the layer stores nothing else of the transform; else
XLA runs :meth:`Transform.inputs` before the layer.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Float32


class Recipe(NamedTuple):
    """The online part of a transform that the kernel which quantizes takes up: a division of every channel.

    Attributes:
      divisors: (K,), positive.
    """

    divisors: Float32[Array, " k"]


@runtime_checkable
class Transform(Protocol):
    """A registered pytree (:class:`fqjax.core.table.Stored`); its arrays may be learned."""

    def weight(self, w: Float[Array, "n k"]) -> Float32[Array, "n k2"]:
        """The weight that stands in W's place."""
        ...

    def inputs(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k2"]:
        """The input that stands in x's place."""
        ...

    def bias(self, w: Float[Array, "n k"], b: Float[Array, " n"] | None) -> Float[Array, " n"] | None:
        """The bias that stands in b's place; differs from it for a shift alone."""
        ...

    def inverse(self) -> "Transform":
        """The transform that undoes this one: ``T.inverse().weight(T.weight(W)) = W``."""
        ...

    def recipe(self) -> Recipe | None:
        """The part that one kernel pass takes up; None if :meth:`inputs` has to run before the layer."""
        ...

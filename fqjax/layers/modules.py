"""What is a model here: a Flax NNX module, and no module of Flax's older API."""

from flax import nnx

from fqjax.runtime.arguments import check_type
from fqjax.runtime.errors import InputError

HOW = (
    "Flax linen is not supported; expected an nnx.Module: the model written with nnx.Linear, whose kernel and bias are those "
    "of linen's Dense"
)


def check_module(model: object) -> nnx.Module:
    """The model, if it is an NNX module.

    Raises:
      InputError: if it is not; for a linen module, alone or with its parameters, saying what to do about it.
    """
    for part in model if isinstance(model, tuple | list) else (model,):
        if is_linen(part):
            raise InputError(f"model: {type(part).__name__} is a linen module; {HOW}")
    return check_type("model", model, nnx.Module, "an nnx.Module")


def is_linen(value: object) -> bool:
    """Whether something is a module of Flax linen."""
    return any(cls.__module__.startswith("flax.linen.") and cls.__name__ == "Module" for cls in type(value).__mro__)


def is_bridged(model: nnx.Module) -> bool:
    """Whether a linen module is wrapped somewhere in a model."""
    return any(isinstance(node, nnx.bridge.ToNNX) for _, node in nnx.iter_graph(model))

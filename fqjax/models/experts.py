"""Mixtures of experts in the families that have them: their configuration, and the module in place of the MLP."""

import dataclasses
import functools

from flax import nnx
from jaxtyping import DTypeLike

from fqjax.layers.experts import Expert, MixtureOfExperts
from fqjax.models.alike import each
from fqjax.models.decoder_config import DecoderConfig
from fqjax.models.hf_config import sizes
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonMapping
from fqjax.runtime.validation import ExpertCount, Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(DecoderConfig):
    """Sizes and constants of a decoder with experts.

    Attributes:
      num_experts: of each mixture.
      num_experts_per_tok: to how many of them a token goes.
      moe_intermediate_size: of an expert; None for ``intermediate_size``.
      decoder_sparse_step: every so many layers one has experts, the last of them; the others have an MLP.
      mlp_only_layers: layers without experts all the same.
      norm_topk_prob: whether the weights of a token's experts are divided by their sum.
    """

    num_experts: ExpertCount = 1
    num_experts_per_tok: Size = 1
    moe_intermediate_size: Size | None = None
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    def has_experts(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def mlps(self, layer: int) -> dict[str, int]:
        if not self.has_experts(layer):
            return super().mlps(layer)
        return {f"mlp.experts.{i}": self.expert_size for i in range(self.num_experts)}


def mixture(config: ExpertsConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> MixtureOfExperts:
    """The experts of a layer and their router, as an :class:`ExpertsConfig` says."""
    c = config
    linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
    experts = each(
        lambda _: Expert(linear(c.hidden_size, 2 * c.expert_size), linear(c.expert_size, c.hidden_size)),
        [None] * c.num_experts,
    )
    gate = linear(c.hidden_size, c.num_experts)
    return MixtureOfExperts(gate, experts, c.num_experts_per_tok, normalized=c.norm_topk_prob)


def read_experts(hf: JsonMapping) -> dict[str, int]:
    """The number of experts, and of those a token goes to, from a Hugging Face configuration.

    Raises:
      InputError: if one is no size, or a token would go to more experts than there are.
    """
    name = "num_experts" if hf.get("num_experts") is not None else "num_local_experts"
    experts, each = (sizes(hf, entry)[entry] for entry in (name, "num_experts_per_tok"))
    if each > experts:
        raise InputError(f"config.json: num_experts_per_tok {each}: expected {experts} at most, as {name}")
    return {"num_experts": experts, "num_experts_per_tok": each}

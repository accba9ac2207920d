"""Integer matrix multiplication, and attention over a key-value cache, for JAX: arrays in, arrays out.

The package stands alone; nothing in it knows of models or quantization methods.
"""

from pallas_kernels.attention.api import decode_attention, quantized_decode_attention
from pallas_kernels.matmul.api import (
    can_use_mosaic,
    grouped_int4_matmul,
    grouped_int8_matmul,
    int4_matmul,
    int8_matmul,
    quantized_matmul,
    weight_only_int4_matmul,
)
from pallas_kernels.matmul.experts import (
    expert_matmul,
    quantize_for_experts,
    quantize_per_token_for_experts,
    row_alignment,
)
from pallas_kernels.matmul.gated import gated_matmul
from pallas_kernels.matmul.hopper.decoder import Decoder
from pallas_kernels.matmul.hopper.decoders import decoder_for
from pallas_kernels.matmul.kind import Weight
from pallas_kernels.matmul.reference import scale_accumulator
from pallas_kernels.packing import pack_int4, unpack_int4
from pallas_kernels.quantize.api import (
    quantize_activated,
    quantize_activations,
    quantize_normalized,
    quantize_per_token,
)

__all__ = [
    "Decoder",
    "Weight",
    "can_use_mosaic",
    "decode_attention",
    "decoder_for",
    "expert_matmul",
    "gated_matmul",
    "grouped_int4_matmul",
    "grouped_int8_matmul",
    "int4_matmul",
    "int8_matmul",
    "pack_int4",
    "quantize_activated",
    "quantize_activations",
    "quantize_for_experts",
    "quantize_normalized",
    "quantize_per_token",
    "quantize_per_token_for_experts",
    "quantized_decode_attention",
    "quantized_matmul",
    "row_alignment",
    "scale_accumulator",
    "unpack_int4",
    "weight_only_int4_matmul",
]

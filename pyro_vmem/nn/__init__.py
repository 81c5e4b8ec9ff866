"""Networks: encoders that turn observations into features, decoders that turn a latent and a template into one."""

from pyro_vmem.nn.causal import CausalNetwork
from pyro_vmem.nn.decoders import ConvDecoder, Decoder, MLPDecoder, WarpDecoder
from pyro_vmem.nn.encoders import ConvEncoder, Encoder, FlatEncoder, MLPEncoder
from pyro_vmem.nn.layers import mlp

__all__ = [
    "CausalNetwork",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "Encoder",
    "FlatEncoder",
    "MLPDecoder",
    "MLPEncoder",
    "WarpDecoder",
    "mlp",
]

"""Sigmoid attention: one function, a definition, and kernels for GPU, TPU and XLA.

Depends on jax alone, so that any model may use it.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431.
"""

from diffmm_kernels.sigmoid_attention.alibi import alibi_slopes as alibi_slopes
from diffmm_kernels.sigmoid_attention.api import OUTPUT_NAME as OUTPUT_NAME
from diffmm_kernels.sigmoid_attention.api import explain_dispatch as explain_dispatch
from diffmm_kernels.sigmoid_attention.api import (
    save_attention_output as save_attention_output,
)
from diffmm_kernels.sigmoid_attention.api import sigmoid_attention as sigmoid_attention
from diffmm_kernels.sigmoid_attention.config import Config as Config
from diffmm_kernels.sigmoid_attention.config import Tiles as Tiles
from diffmm_kernels.sigmoid_attention.decode import sigmoid_decode as sigmoid_decode
from diffmm_kernels.sigmoid_attention.dispatch import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
)
from diffmm_kernels.sigmoid_attention.sharded import (
    sigmoid_attention_sharded as sigmoid_attention_sharded,
)
from diffmm_kernels.sigmoid_attention.varlen import (
    sigmoid_attention_varlen as sigmoid_attention_varlen,
)

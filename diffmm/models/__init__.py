"""Networks: layers, attention by softmax or sigmoid, the transformer, presets.

Modules are Flax NNX in a functional style: ``graphdef, params = nnx.split(model)`` and
everything else in the library works on ``params`` as a plain pytree.
"""

from diffmm.models.attention import AttentionStatistics as AttentionStatistics
from diffmm.models.attention import SigmoidAttention as SigmoidAttention
from diffmm.models.attention import SoftmaxAttention as SoftmaxAttention
from diffmm.models.attention import alibi_slopes as alibi_slopes
from diffmm.models.attention import attention_function as attention_function
from diffmm.models.attention import attention_statistics as attention_statistics
from diffmm.models.attention import segment_mask as segment_mask
from diffmm.models.attention import softmax_attention as softmax_attention
from diffmm.models.axes import logical_axes as logical_axes
from diffmm.models.axes import num_parameters as num_parameters
from diffmm.models.cached import KeyValueCache as KeyValueCache
from diffmm.models.config import TransformerConfig as TransformerConfig
from diffmm.models.config import (
    training_flops_per_token as training_flops_per_token,
)
from diffmm.models.export import export_pretrained as export_pretrained
from diffmm.models.families import FAMILIES as FAMILIES
from diffmm.models.fsq import codes_to_indices as codes_to_indices
from diffmm.models.fsq import indices_to_codes as indices_to_codes
from diffmm.models.fsq import quantize as quantize
from diffmm.models.fsq_autoencoder import FSQAutoencoder as FSQAutoencoder
from diffmm.models.fsq_autoencoder import FSQConfig as FSQConfig
from diffmm.models.fsq_autoencoder import NumpyCodec as NumpyCodec
from diffmm.models.fsq_autoencoder import numpy_codec as numpy_codec
from diffmm.models.fsq_autoencoder import reconstruction_loss as reconstruction_loss
from diffmm.models.layers import GELU as GELU
from diffmm.models.layers import MIXED_VALUES as MIXED_VALUES
from diffmm.models.layers import Attention as Attention
from diffmm.models.layers import Norm as Norm
from diffmm.models.layers import SwiGLU as SwiGLU
from diffmm.models.layers import layer_norm as layer_norm
from diffmm.models.layers import linear as linear
from diffmm.models.layers import repeat_heads as repeat_heads
from diffmm.models.layers import rms_norm as rms_norm
from diffmm.models.layers import rotary_angles as rotary_angles
from diffmm.models.layers import rotate as rotate
from diffmm.models.predict import TransformerPredict as TransformerPredict
from diffmm.models.predict import predict_fn as predict_fn
from diffmm.models.presets import PRESETS as PRESETS
from diffmm.models.presets import TRIMODAL_VOCABULARY_SIZE as TRIMODAL_VOCABULARY_SIZE
from diffmm.models.presets import preset as preset
from diffmm.models.pretrained import Pretrained as Pretrained
from diffmm.models.pretrained import load_pretrained as load_pretrained
from diffmm.models.sigmoid_presets import RECIPES as RECIPES
from diffmm.models.sigmoid_presets import LanguageRecipe as LanguageRecipe
from diffmm.models.sigmoid_presets import recipe as recipe
from diffmm.models.sigmoid_presets import sigmoid_defaults as sigmoid_defaults
from diffmm.models.transformer import Block as Block
from diffmm.models.transformer import Denoiser as Denoiser
from diffmm.models.transformer import unembed as unembed
from diffmm.models.views import row_places as row_places
from diffmm.models.views import view_of as view_of

"""Data: from text, images and sound to batches of one token stream.

Sources give items, tokenizers turn them into codes, `RowLayout` turns codes into rows
of a joint vocabulary, `Mixture` decides which row comes when, `make_loader` batches
them. Canvases for generation come from the same layout. The stream is the one of "The
Design Space of Tri-Modal Masked Diffusion Models" (Bethune et al., arXiv 2602.21472):
task tokens in front, boundary tokens around each modality, packed text, padded pairs.

This room computes with NumPy only; it starts no accelerator.
"""

from diffmm.data.audio_tokenizers import LogMelUnitTokenizer as LogMelUnitTokenizer
from diffmm.data.audio_tokenizers import MuLawTokenizer as MuLawTokenizer
from diffmm.data.canvases import canvas as canvas
from diffmm.data.canvases import infill as infill
from diffmm.data.canvases import read_target as read_target
from diffmm.data.canvases import stack as stack
from diffmm.data.counts import TokenCounts as TokenCounts
from diffmm.data.counts import add_counts as add_counts
from diffmm.data.counts import realised_shares as realised_shares
from diffmm.data.counts import token_counts as token_counts
from diffmm.data.image_tokenizers import (
    CallableImageTokenizer as CallableImageTokenizer,
)
from diffmm.data.image_tokenizers import GreyLevelTokenizer as GreyLevelTokenizer
from diffmm.data.joined import JoinedRows as JoinedRows
from diffmm.data.joined import join as join
from diffmm.data.layout import Geometry as Geometry
from diffmm.data.layout import RowLayout as RowLayout
from diffmm.data.mixture import Draw as Draw
from diffmm.data.mixture import Mixture as Mixture
from diffmm.data.mixture import row_probabilities as row_probabilities
from diffmm.data.mixture import stable_hash as stable_hash
from diffmm.data.packing import Chunks as Chunks
from diffmm.data.packing import chunk_documents as chunk_documents
from diffmm.data.packing import fill_rate as fill_rate
from diffmm.data.packing import pack as pack
from diffmm.data.pipeline import Loader as Loader
from diffmm.data.pipeline import make_loader as make_loader
from diffmm.data.pipeline import process_rows as process_rows
from diffmm.data.rows import PairRows as PairRows
from diffmm.data.rows import RowSource as RowSource
from diffmm.data.rows import TextRows as TextRows
from diffmm.data.templates import TASKS as TASKS
from diffmm.data.templates import TEMPLATES as TEMPLATES
from diffmm.data.templates import BadExampleError as BadExampleError
from diffmm.data.text_tokenizers import ByteTokenizer as ByteTokenizer
from diffmm.data.text_tokenizers import HuggingFaceTokenizer as HuggingFaceTokenizer
from diffmm.data.text_tokenizers import SentencePieceTokenizer as SentencePieceTokenizer
from diffmm.data.trimodal import TrimodalData as TrimodalData
from diffmm.data.trimodal import tokenise as tokenise
from diffmm.data.validate import validate_batch as validate_batch
from diffmm.data.vocabulary import SPECIALS as SPECIALS
from diffmm.data.vocabulary import TRIMODAL as TRIMODAL
from diffmm.data.vocabulary import JointVocabulary as JointVocabulary
from diffmm.data.vocabulary import as_modality as as_modality

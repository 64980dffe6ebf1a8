"""Data sources: random access to examples, before any tokenizer.

Small sets that need no download (digits, speech, prose), a user's own folder, and the
catalogue of `tensorflow_datasets`. `encode_source` turns any of them into codes.
"""

from diffmm.data.sources.digits import DIGIT_CAPTIONS as DIGIT_CAPTIONS
from diffmm.data.sources.digits import DIGIT_NAMES as DIGIT_NAMES
from diffmm.data.sources.digits import digits_source as digits_source
from diffmm.data.sources.encode import Encoded as Encoded
from diffmm.data.sources.encode import encode_source as encode_source
from diffmm.data.sources.example import BadFileError as BadFileError
from diffmm.data.sources.example import Example as Example
from diffmm.data.sources.example import MemorySource as MemorySource
from diffmm.data.sources.example import Source as Source
from diffmm.data.sources.example import hash_split as hash_split
from diffmm.data.sources.folder import FolderSource as FolderSource
from diffmm.data.sources.folder import folder_source as folder_source
from diffmm.data.sources.folder import ljspeech_source as ljspeech_source
from diffmm.data.sources.names import SOURCE_NAMES as SOURCE_NAMES
from diffmm.data.sources.names import limited as limited
from diffmm.data.sources.names import source_by_name as source_by_name
from diffmm.data.sources.prose import prose_source as prose_source
from diffmm.data.sources.speech import SPEECH_WORDS as SPEECH_WORDS
from diffmm.data.sources.speech import SpeechSettings as SpeechSettings
from diffmm.data.sources.speech import cache_directory as cache_directory
from diffmm.data.sources.speech import speech_source as speech_source
from diffmm.data.sources.tensorflow_datasets import KNOWN_FIELDS as KNOWN_FIELDS
from diffmm.data.sources.tensorflow_datasets import Fields as Fields
from diffmm.data.sources.tensorflow_datasets import TfdsSource as TfdsSource
from diffmm.data.sources.tensorflow_datasets import tfds_source as tfds_source

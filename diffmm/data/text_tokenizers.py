"""Text to codes: raw bytes, Hugging Face ``tokenizer.json``, SentencePiece models.

Special tokens (beginning, end, mask) belong to the joint vocabulary, never to the
tokenizer: the tokenizers here add none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from diffmm.data.codes import check_codes, digest


def _check_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name}: text must be a str, got {type(text).__name__}")
    if not text:
        raise ValueError(f"{name}: text is empty; at least one character is needed")
    return text


def _check_file(path: str | os.PathLike[str], what: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: {what} file {str(path)!r} does not exist")
    return path


class ByteTokenizer:
    """UTF-8 bytes as codes: 256 of them, no file, no training.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("añ").tolist()
    [97, 195, 177]
    >>> tokenizer.decode([97, 195])
    'a�'
    """

    name = "bytes"
    vocabulary_size = 256

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the codes."""
        return digest("diffmm.ByteTokenizer/1")

    def encode(self, item: str) -> np.ndarray:
        """Text to its UTF-8 bytes.

        Args:
          item: a non-empty str.

        Returns:
          int32 ``[n]``.

        Raises:
          ValueError: not a str, empty, or with a lone surrogate.
        """
        text = _check_text(item, self.name)
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.name}: text has no UTF-8 form at character {error.start}"
            ) from None
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode(self, codes: Any) -> str:
        """Bytes to text; each ill-formed sequence becomes U+FFFD.

        Args:
          codes: integers ``[n]`` in [0, 256); n may be 0.

        Returns:
          The text.
        """
        array = check_codes(codes, self.vocabulary_size, self.name)
        return array.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the Hugging Face `tokenizers` library.

    The post-processor of the file is not applied, so no special token is added, and
    truncation and padding set in the file are switched off.

    Args:
      path: the ``tokenizer.json``.

    Raises:
      ValueError: no such file, or not a tokenizer.
      ImportError: the library is missing.
    """

    name = "hugging_face"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """See the class."""
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "HuggingFaceTokenizer needs the tokenizers library: "
                'pip install "diffmm[text]"'
            ) from error
        data = _check_file(path, "tokenizer.json").read_bytes()
        try:
            # The library raises plain Exception for a file that is not its own.
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:
            raise ValueError(
                f"path: {str(path)!r} is not a tokenizer.json ({error})"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(f"path: {str(path)!r} holds an empty vocabulary")
        # Ids may have gaps, so the count of entries is not the range of codes.
        self._vocabulary_size = max(ids) + 1
        self._fingerprint = digest("diffmm.HuggingFaceTokenizer/1", data)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id of the file."""
        return self._vocabulary_size

    @property
    def fingerprint(self) -> str:
        """Hex digest of the file."""
        return self._fingerprint

    def encode(self, item: str) -> np.ndarray:
        """Text to codes, without special tokens.

        Args:
          item: a non-empty str.

        Returns:
          int32 ``[n]``, n >= 1.

        Raises:
          ValueError: not a str, empty, or nothing of it is in the vocabulary.
        """
        text = _check_text(item, self.name)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError(f"{self.name}: no token for the text {text[:40]!r}")
        return np.asarray(ids, dtype=np.int32)

    def decode(self, codes: Any) -> str:
        """Codes to text; special tokens of the file are shown, not dropped."""
        array = check_codes(codes, self.vocabulary_size, self.name)
        return str(self._tokenizer.decode(array.tolist(), skip_special_tokens=False))


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file.

    Args:
      path: the model file.

    Raises:
      ValueError: no such file, or not a model.
      ImportError: the library is missing.

    References:
      Kudo, Richardson, "SentencePiece: A simple and language independent subword
      tokenizer and detokenizer for Neural Text Processing", arXiv 1808.06226.
    """

    name = "sentence_piece"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """See the class."""
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                "SentencePieceTokenizer needs the sentencepiece library: "
                'pip install "diffmm[text]"'
            ) from error
        data = _check_file(path, "SentencePiece model").read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(data) and self._processor.LoadFromSerializedProto(data)
        except (RuntimeError, OSError, ValueError):
            loaded = False
        if not loaded:
            raise ValueError(f"path: {str(path)!r} is not a SentencePiece model")
        self._fingerprint = digest("diffmm.SentencePieceTokenizer/1", data)

    @property
    def vocabulary_size(self) -> int:
        """Number of pieces."""
        return int(self._processor.GetPieceSize())

    @property
    def fingerprint(self) -> str:
        """Hex digest of the file."""
        return self._fingerprint

    def encode(self, item: str) -> np.ndarray:
        """Text to codes, without special tokens.

        Args:
          item: a non-empty str.

        Returns:
          int32 ``[n]``, n >= 1.

        Raises:
          ValueError: not a str, empty, or nothing remains after normalisation.
        """
        text = _check_text(item, self.name)
        ids = self._processor.EncodeAsIds(text)
        if not ids:
            raise ValueError(f"{self.name}: no token for the text {text[:40]!r}")
        return np.asarray(ids, dtype=np.int32)

    def decode(self, codes: Any) -> str:
        """Codes to text."""
        array = check_codes(codes, self.vocabulary_size, self.name)
        return str(self._processor.DecodeIds(array.tolist()))

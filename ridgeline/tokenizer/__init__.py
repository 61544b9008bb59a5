"""Text to token ids and back: `load_tokenizer` from either kind of checkpoint, incremental decoding, stop strings."""

from ridgeline.tokenizer.detokenizer import IncrementalDetokenizer, StopStringFinder
from ridgeline.tokenizer.load import load_tokenizer
from ridgeline.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopStringFinder", "Tokenizer", "load_tokenizer"]

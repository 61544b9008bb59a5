"""Text to token ids and back: HF tokenizer.json or GGUF vocabulary, chat template, streaming.

`load_tokenizer` reads, `Tokenizer` encodes and decodes, `IncrementalDetokenizer` turns sampled tokens into
whole characters as they come, `StopStringFinder` looks for stop strings across token borders.
"""

from ridgeline.tokenizer.detokenizer import IncrementalDetokenizer
from ridgeline.tokenizer.load import load_tokenizer
from ridgeline.tokenizer.stop_strings import StopStringFinder
from ridgeline.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopStringFinder", "Tokenizer", "load_tokenizer"]

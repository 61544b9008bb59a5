"""How good a model's predictions are: perplexity, divergence from a reference, a needle in a long context.

Everything is measured through the executor that serves, with the engine's own settings, so that the price of
a quantized weight, an 8-bit cache or a sliding window is the price that a user pays.
"""

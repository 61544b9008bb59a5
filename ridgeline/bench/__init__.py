"""Measurements of the engine. Everything here reports all its samples; medians are the reader's affair."""

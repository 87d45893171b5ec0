"""ME-Switch for Hugging Face: one base model, many fine-tunes as 1-4 bit deltas."""

__version__ = "0.1.0"

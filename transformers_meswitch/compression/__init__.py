"""Turning a fine-tune into a delta: pure functions on tensors, and :mod:`.recipe`, the streamed driver of them."""

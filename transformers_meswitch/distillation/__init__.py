"""Training a delta's step sizes on its expert's logits."""

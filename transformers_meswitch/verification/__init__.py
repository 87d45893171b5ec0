"""Measuring how well a delta stands for its expert, and the record that is kept of it."""

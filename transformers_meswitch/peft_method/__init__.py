"""ME-Switch as a PEFT method: the layers, their tuner, and the switch that all layers of a model read."""

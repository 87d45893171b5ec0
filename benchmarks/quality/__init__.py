"""How much of a fine-tune survives delta compression, on tasks that a program scores. See ``README.md``."""

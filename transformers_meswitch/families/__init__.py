"""Family repos as files: read, changed and written without loading a model."""

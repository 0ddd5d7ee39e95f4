"""The mathematics: tensors in, tensors out. Knows nothing of modules, models or files."""

"""A Graph to predicted tensors; knows no file and no hub."""

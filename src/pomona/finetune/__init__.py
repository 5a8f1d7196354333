"""Train the backbone itself, in PyTorch.

It sees arrays of pixels and labels; sources and OUT are the pipeline's.
"""

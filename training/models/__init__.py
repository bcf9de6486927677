"""Built-in models, from the mean row to a transformer.

A model is a class ``Net(*, dim, genres, …, options)`` whose ``forward(features, mask)`` takes
float32 ``[B, T, D]`` and bool ``[B, T]`` and returns logits ``[B, G]``. There are no other
requirements.
"""

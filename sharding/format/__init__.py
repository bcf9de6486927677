"""The on-disk format: bytes and names of every published file; pure, nothing is opened."""

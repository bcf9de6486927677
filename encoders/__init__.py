"""Encoding of key frames: one feature shard per sealed frame shard."""

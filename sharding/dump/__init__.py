"""A dump of key frames, as delivered: which movies exist, and how to open one."""

"""Dump to shards: what lies on disk, who writes it, and who may read it.

Other rooms use ``forms``, ``labels``, ``storage``, ``frames``, ``features``, ``metadata`` and
``deal``.
"""

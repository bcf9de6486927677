"""Builds frame shards from a dump and feature shards from arrays; defines the format of both.

Other packages use ``format``, ``storage``, ``labels``, ``label_files``, ``frames``, ``features``
and ``assign``.
"""

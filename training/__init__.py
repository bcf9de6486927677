"""Training of genre models on feature shards.

Other packages use ``checkpoint.load_trained``, ``scoring.score_split``, ``metrics``,
``split_selection.split_movies`` and ``loop.train``.
"""

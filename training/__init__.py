"""From feature shards to a trained genre model.

For other rooms: ``checkpoint.load_trained``, ``score.score_split``, ``metrics``,
``movies.split_movies``, and ``loop.train``.
"""

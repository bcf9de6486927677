"""Key frames become features: sealed frame shards in, one feature shard for each out."""

"""Finding one's way in the user's module: wrappers, parametrisations, shards, meta places."""

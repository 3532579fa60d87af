"""Weight space: subspaces, low rank, adapters, sharing, pruning, merging."""

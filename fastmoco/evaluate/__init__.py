"""From a checkpoint to a number: features, kNN, linear probe."""

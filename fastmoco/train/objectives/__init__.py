"""What a method adds to the step: keys, loss, and what follows the optimizer."""

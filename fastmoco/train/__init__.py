"""The MoCo engine: shuffle, queue, momentum, loss, guard, and the loop around the step."""

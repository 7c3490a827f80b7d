"""From tables of people to labels of a set."""

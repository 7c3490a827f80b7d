"""The recipe: its schema, the shipped ones, and how one is read."""

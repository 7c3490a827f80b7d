"""Is this machine ready, and how fast is a recipe on it?"""

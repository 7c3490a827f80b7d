"""The shard set: what pack leaves behind and load reads."""

"""The packing station: from image files to a shard set."""

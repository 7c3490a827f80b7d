"""From a shard set to batches of views: order, augmentation numbers, decoding, hand-over."""

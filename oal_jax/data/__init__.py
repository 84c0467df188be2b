"""Image sets: described, read from every source, streamed, augmented and generated."""

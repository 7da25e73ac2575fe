"""Images: reading, resizing, training samples as a pure function of (seed, step, index), validation pairs."""

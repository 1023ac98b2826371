"""Files to batches: `sources` reads, `rows` knows the formats, `encode` makes tokens, `batches` orders and pads."""

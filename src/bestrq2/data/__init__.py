"""Where audio comes from: decoding, sources, batches, labelled tasks, SoundWorld."""

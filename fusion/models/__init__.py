"""What we know of Stable Diffusion: names of layers, families, tokens, and how an adapter gets into a pipeline."""

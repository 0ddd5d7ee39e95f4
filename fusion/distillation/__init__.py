"""Gated adapters become one plain LoRA with embeddings, learned from prompts alone."""

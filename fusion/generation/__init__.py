"""A pipeline, adapters and a prompt become pictures with recipes; regions, schedulers."""

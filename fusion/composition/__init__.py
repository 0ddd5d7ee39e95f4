"""Several adapters become one: conflicts and interference are reported, then they are fused in one exact step."""

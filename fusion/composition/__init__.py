"""Several adapters become one: conflicts and interference told before, fusion in one exact step."""

"""Base models: opened safely from folders, hub ids and single files."""

"""Pictures of a concept become an adapter. Importing the package or its config needs no torch."""

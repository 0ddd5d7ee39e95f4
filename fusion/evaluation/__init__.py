"""Adapters become numbers."""

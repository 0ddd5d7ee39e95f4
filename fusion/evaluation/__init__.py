"""Measures of adapters in use: output errors, identity in pictures, comparisons and reports."""

"""Folders of adapters: who owns which slice, reservations, unfinished trainings, cached spectra."""

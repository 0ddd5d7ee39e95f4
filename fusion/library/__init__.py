"""Folders of adapters: who owns which slice, reserved slices, folders of unfinished trainings, cached spectra."""

"""Sharing on the Hugging Face Hub: adapters as repositories, the studio as a Space.

Reading them is in `fusion.formats.hub_file`, since `load` takes the id of a repository like a path.
"""

"""Nodes for ComfyUI. `fusion comfyui` writes them with the modules that they need, as a folder for custom_nodes."""
